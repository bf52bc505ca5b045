"""Text dominance read from models: against the eager attention maps that transformers returns."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import tiny
import tiny_internvl
import tiny_llava_next
import tiny_llava_onevision
import tiny_qwen
import vistoken
from test_lifecycle import snapshot
from vistoken.commands.main import app
from vistoken.contract import ModelFacts
from vistoken.dominance import Dominance
from vistoken.errors import AttachError, DataError, MethodError, ModelNotSupported
from vistoken.host import Host
from vistoken.registry import recognise

pytest.importorskip("transformers")

NEW = 4


def padded() -> dict[str, Tensor]:
    """Two rows, of two pictures and of one, the second padded on the left."""
    rows = (tiny.prompt(3, "image", 4, "image", 2, seed=1), tiny.prompt(2, "image", 6, seed=2))
    return {**tiny.batch(*rows), "pixel_values": tiny.pictures(3, seed=5)}


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """A row of `padded` by itself, without padding and without a mask."""
    ids = inputs["input_ids"][row][None, inputs["attention_mask"][row] != 0]
    pixels = inputs["pixel_values"].split([2, 1])[row]
    return {"input_ids": ids, "pixel_values": pixels}


def sharp(model: Any) -> Any:
    """Let attention be far from uniform, and every answer as long as it may be."""
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        getattr(attention, "q_norm", attention.q_proj).weight.data.mul_(30)
    model.generation_config.eos_token_id = None
    return model


def by_hand(
    model: Any, inputs: dict[str, Any], visual: list[list[int]], text: list[list[int]]
) -> list[tuple[float, float]]:
    """MDI and AEI of every layer from the attention maps of an eager `generate`.

    visual, text: their columns in the prompt of each row, as it enters the LLM.
    """
    out = model.generate(
        **inputs,
        max_new_tokens=NEW + 1,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    steps = out.attentions[1:]
    assert len(steps) == NEW
    found = []
    for layer in range(len(steps[0])):
        indices = []
        for row in range(len(visual)):
            density = []
            for columns in (text[row], visual[row]):
                mass = sum(float(s[layer][row, :, 0, columns].sum(-1).mean()) for s in steps)
                density.append((mass / NEW, len(columns)))
            (a, n), (b, m) = density
            indices.append(((a / n) / (b / m), (a / (a + b)) / (n / (n + m))))
        found.append(tuple(sum(part) / len(visual) for part in zip(*indices, strict=True)))
    return found


def check(found: Dominance, wanted: list[tuple[float, float]]) -> None:
    assert found.layers == len(found.mdi) == len(wanted)
    assert found.mdi == pytest.approx([first for first, _ in wanted], rel=1e-4)
    assert found.aei == pytest.approx([second for _, second in wanted], rel=1e-4)


def columns_of(inputs: dict[str, Tensor], *tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Columns of the placeholders, and of all else that is not padding, in each row."""
    visual, text = [], []
    for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"], strict=True):
        visual.append([i for i, token in enumerate(ids) if token in tokens])
        text.append([i for i, token in enumerate(ids) if token not in tokens and mask[i]])
    return visual, text


# --- against eager attention ---------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_dense_equals_the_attention_maps(kv_heads: int) -> None:
    inputs = padded()
    found = vistoken.inspect_dominance(
        sharp(tiny.tiny_llava(kv_heads=kv_heads)), inputs, new_tokens=NEW
    )
    eager = sharp(tiny.tiny_llava(kv_heads=kv_heads, attention="eager"))
    check(found, by_hand(eager, inputs, *columns_of(inputs, tiny.IMAGE)))
    assert found.generated == (NEW, NEW) and found.rows == (0, 1)
    assert found.visual_tokens == found.visual_tokens_dense == (2 * tiny.TOKENS, tiny.TOKENS)
    assert found.text_tokens == (10, 9)
    assert found.attached == ()


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_pruned_equals_the_attention_maps_of_the_pruned_prompt(
    kv_heads: int, positions: str
) -> None:
    inputs, keep = padded(), 5
    method = vistoken.Random(keep=keep, positions=positions)
    model = sharp(tiny.tiny_llava(kv_heads=kv_heads))
    eager = sharp(tiny.tiny_llava(kv_heads=kv_heads, attention="eager"))
    dense = vistoken.inspect_dominance(model, inputs, new_tokens=NEW)
    with vistoken.attach(model, method):
        found = vistoken.inspect_dominance(model, inputs, new_tokens=NEW)
    # row 0: bos 3 [5] 4 [5] 2; row 1: bos 2 [5] 6, behind 6 columns of padding
    visual = [[*range(4, 9), *range(13, 18)], list(range(9, 14))]
    text = [[*range(4), *range(9, 13), 18, 19], [*range(6, 9), *range(14, 20)]]
    with vistoken.attach(eager, method):
        check(found, by_hand(eager, inputs, visual, text))
    assert found.visual_tokens == (10, 5)
    assert found.visual_tokens_dense == (2 * tiny.TOKENS, tiny.TOKENS)
    assert found.attached == (str(method),)
    assert found.mdi != pytest.approx(dense.mdi, rel=0.01)


def test_a_method_that_keeps_everything_changes_nothing() -> None:
    model, inputs = sharp(tiny.tiny_llava()), padded()
    wide = {  # a column of padding in every row stays when nothing is pruned
        **inputs,
        "input_ids": nn.functional.pad(inputs["input_ids"], (2, 0), value=tiny.PAD),
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (2, 0)),
    }
    dense = vistoken.inspect_dominance(model, wide, new_tokens=NEW)
    with vistoken.attach(model, vistoken.Uniform(ratio=0.0)):
        found = vistoken.inspect_dominance(model, wide, new_tokens=NEW)
    assert (found.mdi, found.aei) == (dense.mdi, dense.aei)
    assert found.visual_tokens == dense.visual_tokens
    narrow = vistoken.inspect_dominance(model, inputs, new_tokens=NEW)
    assert dense.mdi == pytest.approx(narrow.mdi, rel=1e-4)
    with vistoken.attach(model, vistoken.Uniform(keep=5)):
        found = vistoken.inspect_dominance(model, wide, new_tokens=NEW)
        narrow = vistoken.inspect_dominance(model, inputs, new_tokens=NEW)
    assert found.mdi == pytest.approx(narrow.mdi, rel=1e-4)


OTHERS = {
    "internvl": (tiny_internvl.tiny_internvl, tiny_internvl.one_picture, tiny_internvl.IMAGE),
    "llava_next": (
        tiny_llava_next.tiny_llava_next,
        tiny_llava_next.one_image,
        tiny_llava_next.IMAGE,
    ),
    "llava_onevision": (
        tiny_llava_onevision.tiny_llava_onevision,
        tiny_llava_onevision.one_image,
        tiny_llava_onevision.IMAGE,
    ),
    "qwen2_5_vl": (tiny_qwen.tiny_qwen2_5_vl, tiny_qwen.one_image, tiny_qwen.IMAGE),
    "qwen3_vl": (tiny_qwen.tiny_qwen3_vl, tiny_qwen.one_image, tiny_qwen.IMAGE),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_host(name: str) -> None:
    build, make, token = OTHERS[name]
    inputs: Any = make()
    model, eager = sharp(build()), sharp(build())
    eager.set_attn_implementation("eager")
    found = vistoken.inspect_dominance(model, inputs, new_tokens=NEW)
    visual, text = columns_of(inputs, token)
    check(found, by_hand(eager, inputs, visual, text))
    first, count = visual[0][0], len(visual[0])
    assert visual[0] == list(range(first, first + count))
    with vistoken.attach(model, vistoken.Uniform(ratio=0.5)) as held:
        found = vistoken.inspect_dominance(model, inputs, new_tokens=NEW)
        (kept,) = held.report().tokens_out
    assert kept < count and found.visual_tokens == (kept,)
    visual = [list(range(first, first + kept))]
    text = [[*range(first), *range(first + kept, first + kept + len(text[0]) - first)]]
    with vistoken.attach(eager, vistoken.Uniform(ratio=0.5)):
        check(found, by_hand(eager, inputs, visual, text))


# --- limits --------------------------------------------------------------------------------------


def test_uniform_attention_gives_one() -> None:
    """Queries of zero see every key alike: each mass is its share of keys, step by step."""
    model = sharp(tiny.tiny_llava())
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    host_masses = recognise(model).attention_masses(padded(), NEW)
    for row, length in enumerate((10 + 2 * tiny.TOKENS, 9 + tiny.TOKENS)):
        each = sum(1 / (length + step) for step in range(1, NEW + 1)) / NEW
        text, visual = host_masses.text_tokens[row], host_masses.visual_tokens[row]
        assert torch.allclose(host_masses.text[:, row], text * each)
        assert torch.allclose(host_masses.visual[:, row], visual * each)
    for method in (None, vistoken.Uniform(keep=4)):
        if method is not None:
            vistoken.attach(model, method)
        found = vistoken.inspect_dominance(model, padded(), new_tokens=NEW)
        assert found.mdi == pytest.approx([1] * 4) and found.aei == pytest.approx([1] * 4)
        assert [third.mdi for third in found.thirds.values()] == pytest.approx([1] * 3)


def test_batch_and_padding_change_nothing() -> None:
    model, inputs = sharp(tiny.tiny_llava()), padded()
    whole = vistoken.inspect_dominance(model, inputs, new_tokens=NEW)
    singles = []
    for row in range(2):
        singles.append(vistoken.inspect_dominance(model, alone(inputs, row), new_tokens=NEW))
    for name in ("mdi", "aei"):
        means = [sum(pair) / 2 for pair in zip(*(getattr(s, name) for s in singles), strict=True)]
        assert getattr(whole, name) == pytest.approx(means, rel=1e-4)
    for third, other in zip(*(s.thirds.values() for s in singles), strict=True):
        (ours,) = (t for t in whole.thirds.values() if t.first == third.first)
        assert ours.mdi == pytest.approx((third.mdi + other.mdi) / 2, rel=1e-4)


def test_what_follows_the_end_token_does_not_count() -> None:
    model, inputs = sharp(tiny.tiny_llava()), padded()
    ids = model.generate(**inputs, max_new_tokens=NEW + 1, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :].tolist()
    end = next(t for t in new[0][1:] if t not in (new[0][0], new[1][0]))
    before = [row.index(end) if end in row[:NEW] else NEW for row in new]
    model.generation_config.eos_token_id = [end, 63 if end != 63 else 62]
    found = vistoken.inspect_dominance(model, inputs, new_tokens=NEW)
    assert found.generated == tuple(before) and min(before) < NEW
    singles = []
    for row, count in enumerate(before):
        singles.append(vistoken.inspect_dominance(model, alone(inputs, row), new_tokens=count))
    means = [(a + b) / 2 for a, b in zip(*(s.mdi for s in singles), strict=True)]
    assert found.mdi == pytest.approx(means, rel=1e-4)
    model.generation_config.eos_token_id = [new[0][0], new[1][0]]
    with pytest.raises(DataError, match="ended every answer at once"):
        vistoken.inspect_dominance(model, inputs, new_tokens=NEW)


def test_rows_without_a_picture_are_left_out() -> None:
    model = sharp(tiny.tiny_llava())
    rows = (tiny.prompt(12, seed=3), tiny.prompt(2, "image", 6, seed=2))
    pixels = tiny.pictures(1, seed=5)
    mixed = {**tiny.batch(*rows), "pixel_values": pixels}
    found = vistoken.inspect_dominance(model, mixed, new_tokens=NEW)
    assert found.rows == (1,) and found.text_tokens == (9,)
    single = {**tiny.batch(rows[1]), "pixel_values": pixels}
    wanted = vistoken.inspect_dominance(model, single, new_tokens=NEW)
    assert found.mdi == pytest.approx(wanted.mdi, rel=1e-4)


# --- the model stays as it was -------------------------------------------------------------------


class Broken(RuntimeError):
    """Raised in the middle of a generation."""


def test_nothing_stays_on_the_model() -> None:
    model, inputs = sharp(tiny.tiny_llava()), tiny.one_image()
    logits = model(**inputs).logits
    before = snapshot(model)
    vistoken.inspect_dominance(model, inputs, new_tokens=2)
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, logits)
    calls = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 6:  # in the second decode step
            raise Broken

    handle = model.model.language_model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(Broken):
        vistoken.inspect_dominance(model, inputs, new_tokens=9)
    handle.remove()
    assert snapshot(model) == before
    with vistoken.attach(model, vistoken.Uniform(keep=4)):
        vistoken.inspect_dominance(model, inputs, new_tokens=2)
    assert snapshot(model) == before


# --- what cannot be measured ---------------------------------------------------------------------


def test_pruning_inside_the_llm_is_refused() -> None:
    model, inputs = tiny.tiny_llava(), tiny.one_image()
    method = vistoken.method_class("fastv").from_options({"keep": 9})
    with vistoken.attach(model, method), pytest.raises(AttachError, match=r"fastv.*inside the LLM"):
        vistoken.inspect_dominance(model, inputs)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, None])
def test_a_bad_number_of_tokens_is_refused(count: Any) -> None:
    with pytest.raises(MethodError, match="new_tokens must be"):
        vistoken.inspect_dominance(tiny.tiny_llava(), tiny.one_image(), new_tokens=count)


def test_prompts_without_pictures_are_refused() -> None:
    model, inputs = tiny.tiny_llava(), tiny.one_image()
    with pytest.raises(DataError, match="needs input_ids and a picture"):
        vistoken.inspect_dominance(model, tiny.batch(tiny.prompt(5)))
    pixels = {"pixel_values": inputs["pixel_values"]}
    with pytest.raises(DataError, match="needs input_ids"):
        vistoken.inspect_dominance(model, pixels)
    with pytest.raises(DataError, match="placeholder"):
        vistoken.inspect_dominance(model, {**tiny.batch(tiny.prompt(5)), **pixels})


def test_models_without_text_are_refused() -> None:
    class Plain(Host):
        title = "a classifier"

        def __init__(self, model: nn.Module) -> None: ...

        def example(self) -> Any: ...

        def estimate(self, keep: int | None, text_tokens: int) -> Any: ...

        def install(self, *arguments: Any) -> None: ...

        facts: ModelFacts

    with pytest.raises(ModelNotSupported, match="a classifier generates no text"):
        Plain(nn.Linear(1, 1)).attention_masses({}, 1)


def test_position_axes_apart_are_refused() -> None:
    from vistoken.adapters.vlm_dominance import NoteAttention, Reading
    from vistoken.adapters.vlm_pipeline import Pipeline

    model, inputs = tiny.tiny_llava(), tiny.one_image()
    host: Any = recognise(model)
    pipeline = Pipeline(host, ())
    vision = pipeline.vision_of(inputs)
    long = pipeline.read(inputs["input_ids"], None, inputs["attention_mask"], None, vision)
    cache = model(**inputs, use_cache=True).past_key_values
    one_more = model(input_ids=torch.tensor([[5]]), past_key_values=cache).past_key_values
    angles = (torch.zeros(3, 1, 1, 8), torch.zeros(3, 1, 1, 8))
    hook = NoteAttention(Reading(host, pipeline, long, one_more, [[]]), 0)
    with pytest.raises(AttachError, match="joins the position axes"):
        hook(model, (), {"hidden_states": torch.zeros(1, 1, 32), "position_embeddings": angles}, 0)


# --- the command ---------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_the_command_on_the_shipped_model(tmp_path: Any) -> None:
    from vistoken.eval.scenes import draw, make_scene

    model, processor = vistoken.load_shipped()
    prompt, path = "USER: <image>\nhow many things are there? ASSISTANT:", tmp_path / "scene.png"
    draw(make_scene(3)).save(path)
    inputs = processor(images=draw(make_scene(3)), text=prompt, return_tensors="pt")
    wanted = vistoken.inspect_dominance(model, inputs, new_tokens=2)
    flags = ("--text-dominance", "--max-new-tokens", 2, "--device", "cpu")
    said = run(*flags, "--image", path, "--prompt", prompt, "--json")
    assert said.exit_code == 0, said.output
    shown = json.loads(said.stdout)
    assert shown.pop("prompt") == prompt and shown.pop("image") == str(path)
    assert shown == json.loads(json.dumps(wanted.to_dict()))
    assert shown["visual_tokens"] == [576] and shown["layers"] == 8
    table = run(*flags)
    assert table.exit_code == 0, table.output
    assert re.search(r"^ *early \(0 to 1\) +[\d.]+ +[\d.]+ *$", table.stdout, re.M)
    assert re.search(r"^ *7 +[\d.]+ +[\d.]+ *$", table.stdout, re.M)
    assert "visual 576; visual before pruning 576; generated" in table.stdout


def test_what_is_printed() -> None:
    text = str(vistoken.inspect_dominance(tiny.tiny_llava(), padded(), new_tokens=2))
    first, heading, *rows = text.splitlines()
    assert "text 10, 9; visual 72, 36; visual before pruning 72, 36; generated 2" in first
    assert heading.split() == ["LLM", "layers", "MDI", "AEI"]
    assert len(rows) == 3 + 4 + 1 and rows[2].startswith("late (2 to 3)")


def test_the_command_refuses_a_picture_it_does_not_use() -> None:
    said = run("--prompt", "what")
    assert said.exit_code == 2 and "add it" in said.stderr
