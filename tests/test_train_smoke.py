"""The training script of the shipped model: its parts against oracles, and a run of seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from tiny_llava_data import Encoder, TrainingBatches, pack, pictures  # noqa: E402
from tiny_llava_eval import _marks, chair, normalise  # noqa: E402
from tiny_llava_model import (  # noqa: E402
    Sizes,
    Teacher,
    build_model,
    build_processor,
    see,
    text_states,
)
from tiny_llava_tokens import (  # noqa: E402
    LEAST,
    concentration,
    quota_scores,
    spread_order,
    top,
    training_subsets,
)
from vistoken.eval.scenes import draw, make_scene, make_scenes, owner_grid  # noqa: E402

SIZES = Sizes(hidden=48, heads=3, tower_layers=3, text_layers=2, text_inner=96, patch=56)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    processor = build_processor(SIZES)
    return build_model(SIZES).eval(), processor, Encoder(dict(processor.tokenizer.get_vocab()))


def test_the_encoder_is_the_tokenizer(parts) -> None:
    _, processor, encode = parts
    text = "is there a star in the image? please answer yes or no. ASSISTANT:"
    assert [encode.table["<bos>"], *encode(text)] == processor.tokenizer(text).input_ids
    said = "a red star, an orange tree and a sun."
    assert processor.tokenizer.decode(encode(said)) == said
    assert processor.tokenizer("zebra").input_ids[-1] == encode.table["<unk>"]


def test_the_training_forward_is_the_stock_forward(parts) -> None:
    model, processor, encode = parts
    scene, text = make_scene(3), "what color is the star?"
    prompt = f"USER: <image>\n{text} ASSISTANT:"
    inputs = processor(text=prompt, images=draw(scene), return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], normalise(pictures([scene])))
    with torch.no_grad():
        seen = see(model, inputs["pixel_values"])
        tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
        torch.testing.assert_close(seen.features, tower.hidden_states[-2][:, 1:])
        torch.testing.assert_close(seen.cls_end, tower.pooler_output)
        model.set_attn_implementation("eager")
        rows = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(seen.attention, rows[-2].mean(dim=1)[:, 0, 1:])
        others = [("describe the image.", "a red star."), (text, "red"), ("where is it?", "left")]
        packed = pack(encode, [others])
        ask = (packed["segment"][0] == 2) & (packed["targets"][0] == encode.table["red"])
        logits = text_states(
            model,
            seen.features,
            torch.tensor(encode.start),
            *(packed[k] for k in ("ids", "segment", "step")),
        )
        torch.testing.assert_close(logits[:, ask][:, 0], model(**inputs).logits[:, -1])


def test_hidden_tokens_are_as_good_as_gone(parts) -> None:
    model, _, encode = parts
    scenes = make_scenes(2)
    packed = pack(encode, [[("is there a star?", "yes"), ("how many stars?", "two")]] * 2)
    words = [packed[k] for k in ("ids", "segment", "step")]
    start = torch.tensor(encode.start)
    with torch.no_grad():
        features = see(model, normalise(pictures(scenes))).features
        keep = top(torch.rand(2, 36), torch.tensor([9, 9]))
        yes = torch.ones(2, dtype=torch.bool)
        hidden = text_states(model, features, start, *words, keep=keep, renumber=yes)
        gone = text_states(model, features[keep].view(2, 9, -1), start, *words)
        torch.testing.assert_close(hidden, gone)
        original = text_states(model, features, start, *words, keep=keep, renumber=~yes)
        assert not torch.allclose(hidden, original)


def test_packing_marks_answers_and_drops_what_does_not_fit(parts) -> None:
    _, _, encode = parts
    packed = pack(encode, [[("where is it?", "top left"), ("how many?", "two")], [("what?", "no")]])
    words = {i: w for w, i in encode.table.items()}
    row = [words[i] for i in packed["ids"][0].tolist()]
    assert row[:9] == ["where", "is", "it", "?", "assistant", ":", "top", "left", "<eos>"]
    targets = [words.get(i, "-") for i in packed["targets"][0].tolist()]
    assert targets[:9] == ["-", "-", "-", "-", "-", "top", "left", "<eos>", "-"]
    assert packed["step"][0].tolist() == [*range(9), *range(7)]
    assert packed["segment"][1].tolist() == [1] * 6 + [0] * 10
    short = pack(encode, [[("where is it?", "top left"), ("how many?", "two")]], length=12)
    assert short["ids"].shape == (1, 12)
    assert short["segment"].max() == 1
    logits = torch.nn.functional.one_hot(packed["targets"].clamp(min=0), 192).float()
    assert _marks(logits, packed) == [[True, True], [True]]
    logits[0, 5] = 0
    assert _marks(logits, packed) == [[False, True], [True]]


def test_batches_do_not_depend_on_who_makes_them(parts) -> None:
    _, _, encode = parts
    data = [TrainingBatches(encode, 4, 24, 189, 0)[1] for _ in range(2)]
    for name in ("images", "owner", "things", "ids", "targets"):
        assert torch.equal(getattr(data[0], name), getattr(data[1], name))
    assert (data[0].owner[2].view(24, 24).numpy() == owner_grid(make_scene(6, "train"))).all()


def test_subsets_have_the_sizes_and_places_they_should(parts) -> None:
    _, _, encode = parts
    torch.manual_seed(0)
    batch = TrainingBatches(encode, 8, 24, 189, 0)[0]
    attention, spread = torch.rand(8, 576), spread_order(24)
    counts = torch.cat(
        [training_subsets(batch, attention, spread)[0].sum(dim=1) for _ in range(40)]
    )
    shortened = counts[(counts > 0) & (counts < 576)]
    assert shortened.min() >= LEAST
    assert 0.3 < len(shortened) / len(counts) < 0.5
    assert 0 < (counts == 0).sum() < 20
    even = top(spread[None], torch.tensor([64])).view(8, 3, 8, 3).sum(dim=(1, 3))
    assert even.max() <= 2  # 64 of 576, one or two in every square of nine
    quota = top(quota_scores(attention, 24, 64), torch.full((8,), 64))
    cells = quota.view(8, 4, 6, 4, 6).sum(dim=(2, 4))
    assert cells.min() >= 2
    assert (quota.sum(dim=1) == 64).all()


def test_concentration_counts_what_lies_on_things() -> None:
    owner = torch.tensor([[0, 0, -1, -1, 1, -1]])
    attention = torch.tensor([[0.4, 0.1, 0.3, 0.1, 0.05, 0.05]])
    found = concentration(attention, owner, 2)
    assert found["area_of_things"] == pytest.approx(0.5)
    assert found["attention_on_things"] == pytest.approx(0.55)
    assert found["top_2_on_things"] == pytest.approx(0.5)
    assert found["things_reached_by_top_2"] == pytest.approx(0.5)


def test_chair_counts_mentions() -> None:
    scene = make_scene(0)
    color, kind = scene.things[0].color, scene.things[0].kind
    result = chair([(scene, f"a {color} {kind} and a red boat."), (scene, f"a {kind}.")])
    assert result["chair_i"] == pytest.approx(33.33)
    assert result["chair_s"] == 50


def test_teacher_is_content_with_a_tower_that_knows(parts) -> None:
    """Heads that read the truth from the features have a kind loss near zero, others do not."""
    _, _, encode = parts
    batch = TrainingBatches(encode, 4, SIZES.grid, 189, 0)[0]
    teacher = Teacher(SIZES)
    torch.manual_seed(0)
    seen = see(build_model(SIZES), normalise(batch.images))
    before = teacher(seen, batch)
    assert all(torch.isfinite(v) for v in before.values())
    owned = (batch.owner >= 0).float()
    seen.attention = owned / owned.sum(dim=1, keepdim=True)
    best = -(seen.attention * seen.attention.clamp(min=1e-6).log()).sum(dim=1).mean()
    after = teacher(seen, batch)
    assert after["attention"].item() == pytest.approx(best.item(), rel=1e-4)
    assert before["attention"] > after["attention"]


@pytest.mark.slow
def test_the_script_learns_saves_and_goes_on(tmp_path) -> None:
    # One thread: tensors are so small that threads would wait for each other most of the time.
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        script = str(EXAMPLES / "train_tiny_llava.py")
        command = [sys.executable, script, "--out", str(tmp_path), "--smoke", *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    done = run()
    assert "step    40" in done.stdout
    history = json.loads((tmp_path / "history.json").read_text())
    texts = [h["text"] for h in history if "text" in h]
    assert texts[-1] < 0.6 * texts[0]
    assert history[-1]["cls"] < history[0]["cls"]
    run("--steps", "42", "--resume")
    longer = json.loads((tmp_path / "history.json").read_text())
    assert longer[: len(history)] == history
    assert longer[-1]["step"] == 42

    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["training"]["steps"] == 42
    full = next(r for r in report["accuracy"] if r["selection"] == "full")
    assert 0 <= full["yes_no"] <= 100
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    processor = LlavaProcessor.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    prompt = "USER: <image>\ndescribe the image. ASSISTANT:"
    inputs = processor(text=prompt, images=draw(make_scene(0)), return_tensors="pt")
    out = model.float().generate(**inputs, max_new_tokens=3)
    assert out.shape[1] > inputs["input_ids"].shape[1]
    card = (tmp_path / "model" / "README.md").read_text()
    assert "## Limits" in card
    assert f"{full['color']:.1f}" in card
