"""Bad input gets one clear error before any edit; foreign changes are never overwritten."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
import vistoken
from vistoken.errors import AttachError, DataError, MethodError, ModelNotSupported, VistokenError

pytest.importorskip("transformers")


@pytest.fixture()
def model() -> Any:
    return tiny.tiny_llava()


def untouched(model: Any) -> bool:
    return "_vistoken" not in model.__dict__ and not any(
        module._forward_pre_hooks or "_mixed_by_vistoken" in vars(type(module))
        for module in model.modules()
    )


HOLOV = {"keep": 4, "method": "holov"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.0}, "ratio must be at least 0 and below 1, got 1.0"),
        ({"ratio": -0.1}, "got -0.1"),
        ({"ratio": math.nan}, "got nan"),
        ({"ratio": math.inf}, "got inf"),
        ({"ratio": "0.5"}, "got '0.5'"),
        ({"ratio": True}, "got True"),
        ({}, "exactly one of ratio and keep"),
        ({"ratio": 0.5, "keep": 4}, "exactly one of ratio and keep"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"keep": -3}, "got -3"),
        ({"ratio": 10**400}, "ratio must be at least 0 and below 1"),
        ({"keep": 2.5}, "keep must be a whole number"),
        ({"keep": 4, "method": "holo"}, "no method 'holo'. Did you mean 'holov'?"),
        ({**HOLOV, "mdoe": "paper"}, "no option 'mdoe'. Did you mean 'mode'?"),
        ({**HOLOV, "mode": "2d"}, "one of 'paper', 'released', 'paper-2d', got '2d'"),
        ({**HOLOV, "crops": 0}, "crops must be at least 1"),
        ({**HOLOV, "crops": 1.5}, "crops must be at least 1, got 1.5"),
        ({"keep": 4, "positions": "both"}, "'renumber', 'original'"),
        ({"keep": 7, "method": "pooling"}, "Budgets nearby"),
        ({"keep": 4, "method": "random", "seed": -1}, "seed must be at least 0"),
        ({"keep": 4, "method": "uniform", "seed": 1}, "uniform has no option 'seed'"),
    ],
)
def test_budgets_and_options(model: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError) as caught:
        vistoken.prune_visual_tokens(model, **options)
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, VistokenError)
    assert untouched(model)


def test_unsupported_models_name_what_was_looked_for() -> None:
    with pytest.raises(ModelNotSupported) as caught:
        vistoken.prune_visual_tokens(nn.Sequential(nn.Linear(2, 2)), keep=4)
    assert "Sequential < Module" in str(caught.value)
    assert "LLaVA-1.5: LlavaForConditionalGeneration" in str(caught.value)
    with pytest.raises(AttachError, match="torch.nn.Module, got str"):
        vistoken.prune_visual_tokens("llava", keep=4)


def test_a_llava_with_another_tower_names_the_missing_part(model: Any) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    model.model.vision_tower = SiglipVisionModel._from_config(vision)
    with pytest.raises(ModelNotSupported, match=r"with a CLIP tower, but has no .*class_embedding"):
        vistoken.prune_visual_tokens(model, keep=4)
    assert untouched(model)


def test_feature_settings_that_do_not_fit(model: Any) -> None:
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ModelNotSupported, match="got 'full'"):
        vistoken.prune_visual_tokens(model, keep=4)
    model.config.vision_feature_select_strategy = "default"
    model.config.vision_feature_layer = 0
    with pytest.raises(ModelNotSupported, match="takes the embeddings"):
        vistoken.prune_visual_tokens(model, keep=4)


def test_the_same_place_is_taken_once(model: Any) -> None:
    vistoken.prune_visual_tokens(model, keep=9)
    for second in ("cls_topk", "holov"):
        with pytest.raises(AttachError, match="spread is attached already"):
            vistoken.prune_visual_tokens(model, keep=4, method=second)
    assert len(vistoken.attachments(model)) == 1
    vistoken.detach(model)
    with pytest.raises(AttachError, match="uniform is attached already"):
        vistoken.attach(model, [vistoken.Uniform(keep=9), vistoken.ClsTopK(keep=4)])
    assert untouched(model)


def test_what_is_not_a_method(model: Any) -> None:
    for wrong, words in (([], "empty"), (3, "got 3"), (["holov"], "got 'holov'")):
        with pytest.raises(MethodError, match=words):
            vistoken.attach(model, wrong)
    with pytest.raises(MethodError, match="no method family 'prunning'"):
        vistoken.list_methods("prunning")


def test_recipes_that_are_not(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    with pytest.raises(DataError, match="no recipe file"):
        vistoken.attach(model, path)
    for content, error, words in (
        ("{", DataError, "is not JSON"),
        ("[]", DataError, "needs a list"),
        ('{"methods": [3]}', MethodError, "mapping with a"),
        ('{"methods": [{"name": "holov", "keep": 4, "tau": 1}]}', MethodError, "no option 'tau'"),
        ('{"methods": [{"name": "flov", "keep": 4}]}', MethodError, "no method 'flov'"),
        ('{"methods": [{"name": "holov", "keep": "4"}]}', MethodError, "got '4'"),
    ):
        path.write_text(content)
        with pytest.raises(error, match=words):
            vistoken.attach(model, str(path))
    assert untouched(model)
    vistoken.prune_visual_tokens(model, keep=4).save(path)
    assert json.loads(path.read_text())["methods"][0]["name"] == "spread"


def test_a_failing_install_leaves_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vistoken.edits import Edits

    def fail(self: Any, module: Any, hook: Any) -> None:
        raise RuntimeError("planned")

    monkeypatch.setattr(Edits, "hook_after", fail)
    with pytest.raises(RuntimeError, match="planned"):
        vistoken.prune_visual_tokens(model, keep=4)
    assert untouched(model)


def test_foreign_changes_are_not_overwritten(model: Any) -> None:
    held = vistoken.prune_visual_tokens(model, keep=4)
    pipeline = model.__dict__["_vistoken_pipeline"]
    model.__dict__["_vistoken_pipeline"] = "other"
    with pytest.raises(AttachError, match="changed after vistoken set it"):
        held.detach()
    model.__dict__["_vistoken_pipeline"] = pipeline

    hooks = dict(model._forward_pre_hooks)
    model._forward_pre_hooks.clear()
    with pytest.raises(AttachError, match="hook of vistoken"):
        held.detach()
    model._forward_pre_hooks.update(hooks)

    mixed = type(model)
    model.__class__ = mixed.__bases__[1]
    with pytest.raises(AttachError, match="class of LlavaForConditionalGeneration"):
        held.detach()
    model.__class__ = mixed
    held.detach()
    assert untouched(model)


def test_compiled_and_wrapped_models_are_refused(model: Any) -> None:
    with pytest.raises(AttachError, match="before compiling"):
        vistoken.prune_visual_tokens(torch.compile(model, backend="eager"), keep=4)
    with pytest.raises(AttachError, match="DataParallel: attach to the model before"):
        vistoken.prune_visual_tokens(nn.DataParallel(model), keep=4)
    model.compile(backend="eager")
    with pytest.raises(AttachError, match="attach first, then compile"):
        vistoken.prune_visual_tokens(model, keep=4)
    assert untouched(model)


def test_an_instance_generate_would_hide_the_edit(model: Any) -> None:
    model.generate = model.generate
    with pytest.raises(AttachError, match="generate was replaced on the instance"):
        vistoken.prune_visual_tokens(model, keep=4)
    del model.generate
    assert untouched(model)


def test_report_before_the_first_call(model: Any) -> None:
    held = vistoken.prune_visual_tokens(model, keep=4)
    with pytest.raises(VistokenError, match="run the model once"):
        held.report()


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'HoloX'"):
        vistoken.HoloX  # noqa: B018
