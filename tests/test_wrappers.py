"""Models inside other libraries: PEFT, accelerate, subclasses, nested attachments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
import vistoken

transformers = pytest.importorskip("transformers")
NEW = 5


def generate(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_peft(targets: Any) -> None:
    peft = pytest.importorskip("peft")
    base = tiny.tiny_llava()
    inputs = tiny.one_image()
    config = peft.LoraConfig(
        target_modules=targets, init_lora_weights=False, r=2, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config).eval()
    dense = generate(model, inputs)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    held = vistoken.prune_visual_tokens(model, keep=9, method="cls_topk")
    pruned, kept = generate(model, inputs), held.report().kept[0]
    vistoken.detach(model)
    assert torch.equal(generate(model, inputs), dense)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    merged = model.merge_and_unload()
    with vistoken.prune_visual_tokens(merged, keep=9, method="cls_topk") as held:
        assert torch.equal(generate(merged, inputs), pruned)
        assert torch.equal(held.report().kept[0], kept)


def test_lora_added_after_attaching_is_read_too() -> None:
    peft = pytest.importorskip("peft")
    inputs = tiny.one_image()
    config = peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False, r=2)
    base = tiny.tiny_llava()
    held = vistoken.prune_visual_tokens(base, keep=9, method="cls_topk")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config).eval()
    model(**inputs)
    late = held.report().kept[0]
    merged = model.merge_and_unload()
    vistoken.detach(merged)
    with vistoken.prune_visual_tokens(merged, keep=9, method="cls_topk") as held:
        merged(**inputs)
        assert torch.equal(held.report().kept[0], late)


@pytest.mark.parametrize("attach_first", [False, True])
def test_accelerate_offload(attach_first: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny.tiny_llava()
    inputs = tiny.one_image()
    dense = generate(model, inputs)
    with vistoken.prune_visual_tokens(model, keep=9):
        pruned = generate(model, inputs)
    if attach_first:
        held = vistoken.prune_visual_tokens(model, keep=9)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if not attach_first:
        held = vistoken.prune_visual_tokens(model, keep=9)
    assert torch.equal(generate(model, inputs), pruned)
    held.detach()
    assert torch.equal(generate(model, inputs), dense)


def test_a_subclass_of_the_users() -> None:
    class Mine(transformers.LlavaForConditionalGeneration):
        def extra(self) -> int:
            return 7

    model = tiny.tiny_llava()
    model.__class__ = Mine
    inputs = tiny.one_image()
    with vistoken.prune_visual_tokens(model, keep=9):
        assert model.extra() == 7 and isinstance(model, Mine)
        assert generate(model, inputs).shape[1] == inputs["input_ids"].shape[1] + NEW
    assert type(model) is Mine


def test_saving_an_attached_model_saves_the_bare_one(tmp_path: Any) -> None:
    model = tiny.tiny_llava()
    inputs = tiny.one_image()
    dense = generate(model, inputs)
    keys = list(model.state_dict())
    with vistoken.prune_visual_tokens(model, keep=9):
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.architectures == ["LlavaForConditionalGeneration"]
    assert torch.equal(generate(again, inputs), dense)


def test_two_models_that_share_a_tower_do_not_mix() -> None:
    first, second = tiny.tiny_llava(seed=0), tiny.tiny_llava(seed=1)
    second.model.vision_tower = first.model.vision_tower
    inputs = tiny.one_image()
    alone = generate(second, inputs)
    with vistoken.prune_visual_tokens(first, keep=9, method="cls_topk") as one:
        assert torch.equal(generate(second, inputs), alone)
        with vistoken.prune_visual_tokens(second, keep=4, method="cls_topk") as other:
            generate(first, inputs)
            generate(second, inputs)
            assert one.report().tokens_out == [9]
            assert other.report().tokens_out == [4]


def test_the_tower_alone_runs_untouched() -> None:
    model = tiny.tiny_llava()
    pixels = tiny.pictures(1)
    bare = model.get_image_features(pixels, return_dict=True).pooler_output[0]
    with vistoken.prune_visual_tokens(model, keep=9):
        features = model.get_image_features(pixels, return_dict=True).pooler_output[0]
    assert torch.equal(features, bare)


def test_repr_and_inspection() -> None:
    model = tiny.tiny_llava()
    held = vistoken.prune_visual_tokens(model, ratio=0.75)
    assert repr(held) == "<Attachment attached: spread(ratio=0.75) on LLaVA-1.5>"
    seen = vistoken.inspect(model)
    assert seen.attached == ("spread(ratio=0.75)",)
    assert "36 visual tokens a picture (6 x 6)" in str(seen)
    assert set(seen.methods) == set(vistoken.method_names("pruning"))
    assert seen.to_dict()["facts"]["grid"] == (6, 6)
    held.detach()
    assert "detached" in repr(held)
    assert vistoken.inspect(model).attached == ()
