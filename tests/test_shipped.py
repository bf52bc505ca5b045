"""The model inside the package: it loads without a network, is what its card says, and can see."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
import torch

from vistoken.errors import MethodError, VistokenError
from vistoken.eval.scenes import (
    draw,
    make_scene,
    make_scenes,
    mentioned,
    object_mask,
    questions,
    truth,
)
from vistoken.shipped import list_shipped, load_shipped

pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "vistoken" / "shipped_models" / "tiny-llava"
RESULT = ROOT / "eval" / "results" / "tiny_llava.json"
PROMPT = "USER: <image>\n{} ASSISTANT:"


@pytest.fixture(scope="module")
def shipped():
    return load_shipped("tiny-llava")


def answers(model, processor, pictures, texts, **options) -> list[str]:
    inputs = processor(
        text=[PROMPT.format(t) for t in texts], images=pictures, return_tensors="pt", padding=True
    )
    out = model.generate(**inputs, do_sample=False, **options)
    said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [s.strip() for s in said]


def test_it_loads_without_a_network_as_a_stock_llava(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, processor = load_shipped("tiny-llava", dtype=torch.bfloat16)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert 6e6 < sum(p.numel() for p in model.parameters()) < 8e6
    assert model.config.vision_feature_layer == -2
    assert model.config.vision_feature_select_strategy == "default"
    assert (FOLDER / "model.safetensors").stat().st_size < 16e6
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 16e6


def test_the_default_is_float32_and_one_picture_is_576_tokens(shipped) -> None:
    model, processor = shipped
    assert model.dtype == torch.float32
    wide = draw(make_scene(0)).resize((500, 300))
    inputs = processor(text=PROMPT.format("where is the star?"), images=wide, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 336, 336)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 576
    assert list_shipped() == ["tiny-llava"]


def test_it_answers_what_the_pictures_show(shipped) -> None:
    model, processor = shipped
    right: dict[str, list[bool]] = {}
    for scene in make_scenes(5, start=5000):  # beyond the scenes of the evaluation
        asked = questions(scene, tasks=("exists", "color", "quadrant"), negatives="adversarial")
        said = answers(
            model, processor, [draw(scene)] * len(asked), [q.text for q in asked], max_new_tokens=4
        )
        for q, answer in zip(asked, said, strict=True):
            right.setdefault(q.task, []).append(answer == q.answer)
    assert sum(right["exists"]) / len(right["exists"]) > 0.85
    assert sum(right["color"]) / len(right["color"]) > 0.8
    assert sum(right["quadrant"]) / len(right["quadrant"]) > 0.8


def test_captions_name_what_is_there_and_invent_something(shipped) -> None:
    model, processor = shipped
    scenes = make_scenes(6, start=6000)
    said = answers(
        model, processor, [draw(s) for s in scenes], ["describe the image."] * 6, max_new_tokens=64
    )
    named = [
        (k, k in truth(s)) for s, text in zip(scenes, said, strict=True) for k in mentioned(text)
    ]
    invented = sum(not real for _, real in named)
    assert 1 <= invented < 0.25 * len(named)
    assert all(text.endswith(".") for text in said)


def test_left_padding_changes_no_answer(shipped) -> None:
    model, processor = shipped
    scene = make_scene(5001)
    texts = ["how many objects are there in the image?", "describe the image."]
    batch = answers(model, processor, [draw(scene)] * 2, texts, max_new_tokens=12)
    alone = [answers(model, processor, [draw(scene)], [t], max_new_tokens=12)[0] for t in texts]
    assert batch == alone


def test_it_works_in_a_pipeline(shipped) -> None:
    from transformers import pipeline

    model, processor = shipped
    scene = make_scene(5002)
    (question,) = (q for q in questions(scene, tasks=("color",)))
    content = [{"type": "image", "image": draw(scene)}, {"type": "text", "text": question.text}]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    out = pipe(
        text=[{"role": "user", "content": content}], max_new_tokens=8, return_full_text=False
    )
    assert out[0]["generated_text"].strip() == question.answer


def test_cls_looks_at_things_in_the_feature_layer(shipped) -> None:
    model, processor = shipped
    scenes = make_scenes(4, start=5000)
    pixels = processor.image_processor([draw(s) for s in scenes], return_tensors="pt")
    eager = load_shipped("tiny-llava")[0]
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        rows = eager.model.vision_tower(pixels["pixel_values"], output_attentions=True).attentions
    attention = rows[-2].mean(dim=1)[:, 0, 1:]
    owned = torch.stack([torch.from_numpy(object_mask(s)).flatten() for s in scenes])
    share = (attention * owned).sum(dim=1) / attention.sum(dim=1)
    assert share.mean() > 0.6
    assert owned.float().mean() < 0.2


def test_the_published_figures_meet_the_bars() -> None:
    report = json.loads(RESULT.read_text())
    assert report["pictures"] >= 1000
    rows = {(r["selection"], r["visual_tokens"], r["positions"]): r for r in report["accuracy"]}
    full = rows["full", 576, "original"]
    assert full["yes_no"] >= 93
    assert full["yes_no_adversarial"] >= 85
    assert full["color"] >= 95
    assert full["quadrant"] >= 93
    assert 6 <= report["captions"]["full 576"]["chair_i"] <= 15
    for places in ("original", "renumbered"):
        good, chance = rows["cls_quota", 192, places], rows["random", 192, places]
        few, few_chance = rows["cls_quota", 64, places], rows["random", 64, places]
        for task in ("yes_no", "color", "quadrant"):
            assert full[task] - good[task] <= 2
            assert full[task] - chance[task] <= 6
            assert few[task] - few_chance[task] >= 5


def test_the_card_is_written_from_the_figures(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from tiny_llava_card import write_card

    write_card(tmp_path / "README.md", json.loads(RESULT.read_text()))
    assert (tmp_path / "README.md").read_text() == (FOLDER / "README.md").read_text()


def test_unknown_names_and_missing_packages_are_explained(monkeypatch) -> None:
    with pytest.raises(
        MethodError, match=r"no shipped model 'tiny-lava'.*Did you mean 'tiny-llava'"
    ):
        load_shipped("tiny-lava")
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(VistokenError, match=r"vistoken\[vlm\]"):
        load_shipped("tiny-llava")
