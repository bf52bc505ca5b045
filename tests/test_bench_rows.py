"""The benchmark's checks of methods that merge, or act inside the tower or the LLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vistoken

pytest.importorskip("transformers")

from vistoken.eval import bench_rows  # noqa: E402
from vistoken.eval.bench_models import build_model, find_size, make_inputs  # noqa: E402
from vistoken.eval.bench_rows import (  # noqa: E402
    cache_fault,
    check_variant,
    compare_rows,
    compare_with_masked_keys,
    places,
)
from vistoken.eval.bench_variants import (  # noqa: E402
    NEXT,
    SMOKE,
    TILED_VARIANTS,
    VARIANTS,
    Settings,
    Variant,
    preset,
)
from vistoken.eval.timing import CheckFailed  # noqa: E402

FASTV = Variant("fastv")
BY_ROWS = ("visionzip", "vmtc", "flowcut", "tome", "vflowopt", "fastv", "pyramid", "adaptinfer")


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model("tiny", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def eager() -> Any:
    return build_model("tiny", device="cpu", dtype=torch.float32, attention="eager")


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, torch.Tensor]:
    return make_inputs(model, 2, before=6, after=4)


# --- what is measured ----------------------------------------------------------------------------


def test_every_method_is_measured() -> None:
    assert {variant.method for variant in VARIANTS} == set(vistoken.method_names("pruning"))
    assert len({variant.label for variant in VARIANTS}) == len(VARIANTS)


def test_only_wide_variants_go_through_every_budget() -> None:
    settings = Settings()
    wide = ["spread", "holov (paper)", "cls_topk", "random"]
    assert [variant.label for variant in settings.variants_at(192)] == wide
    assert settings.variants_at(64) == VARIANTS
    assert settings.at((100, 50)).variants_at(50) == VARIANTS
    assert len(settings.at((100, 50)).variants_at(100)) == len(wide)


def test_presets() -> None:
    assert preset("llava-next-7b") is NEXT and preset("llava-1.5-7b") == Settings()
    assert preset("llava-next-7b", smoke=True).model == "tiny-next"
    assert NEXT.file_name == "bench_prune_next" and Settings().file_name == "bench_prune"
    # 5 views of 576 tokens, and a newline token for each of 48 rows
    assert NEXT.visual_tokens == 2880 + 48 == find_size("llava-next-7b").visual_tokens


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [v for v in VARIANTS if v.method in (*BY_ROWS, "sparsevlm")],
    ids=lambda variant: variant.label,
)
def test_a_row_is_what_it_is_alone(model: Any, inputs: Any, variant: Variant) -> None:
    for keep in SMOKE.keeps:
        found = check_variant(model, inputs, variant, keep, inputs)
        assert found.reference == "row alone" and found.budget == 1e-4 < found.control
        assert max(found.logits, found.decode) <= 1e-4
    assert not vistoken.attachments(model)


@pytest.mark.parametrize("method", ["flowcut", "fastv"])
def test_half_precision_compares_with_copies(method: str) -> None:
    """bf16 on the CPU: row 0 among copies of itself is bit-equal, row 1 is far away."""
    half = build_model("tiny", device="cpu", dtype=torch.bfloat16)
    given = make_inputs(half, 3, before=6, after=4)
    found = compare_rows(half, given, Variant(method), 12)
    assert found.logits == found.decode == 0.0 and found.budget == 0.1 and found.control > 0.2


def test_a_row_that_depends_on_its_neighbors_is_found(
    model: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A choice by the mean attention of the whole batch."""
    import vistoken.pruning.fastv as fastv

    own = fastv.select
    monkeypatch.setattr(
        fastv, "select", lambda rows, keep: own(rows.mean(0, keepdim=True).expand_as(rows), keep)
    )
    with pytest.raises(CheckFailed, match="fastv at 12 tokens: a row keeps other tokens"):
        compare_rows(model, inputs, FASTV, 12)


def test_a_row_that_equals_its_neighbor_is_refused(model: Any, inputs: Any) -> None:
    twins = {name: value[[0, 0]] for name, value in inputs.items()}
    with pytest.raises(CheckFailed, match="the check is blind"):
        compare_rows(model, twins, FASTV, 12)


def test_a_cache_of_another_length_is_found(model: Any, inputs: Any) -> None:
    with FASTV.attach(model, 12), torch.no_grad():
        cache = model(**inputs).past_key_values
    lengths = [46, 46, 22, 22, 22]  # 10 words; layers 0 and 1 see all 36 tokens, the others 12
    assert cache_fault(cache, lengths) is None
    fault = cache_fault(cache, [46, 46, 22, 23, 22])
    assert fault == "the KV cache holds 22 tokens in layer 3, the prompt should have 23 there"
    assert "has 5 layers, the report 4" in (cache_fault(cache, lengths[:4]) or "")


def test_a_report_that_counts_wrong_is_found(
    model: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = bench_rows.prompt_lengths
    monkeypatch.setattr(
        bench_rows, "prompt_lengths", lambda *given: [length + 1 for length in right(*given)]
    )
    with pytest.raises(CheckFailed, match="holds 46 tokens in layer 0"):
        compare_rows(model, inputs, FASTV, 12)


# --- masked keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fastv", "pyramid"])
def test_one_cut_is_hidden_keys(model: Any, eager: Any, inputs: Any, method: str) -> None:
    for keep in SMOKE.keeps:
        found = compare_with_masked_keys(model, eager, inputs, Variant(method), keep)
        assert found is not None and found.reference == "masked keys"
        assert max(found.logits, found.decode) < 1e-5 and found.control > 1e-3
    assert not any(layer._forward_pre_hooks for layer in eager.model.language_model.layers)


@pytest.mark.parametrize("label", ["spread", "adaptinfer", "sparsevlm (v1.5)", "vflowopt"])
def test_other_methods_have_no_such_oracle(model: Any, eager: Any, inputs: Any, label: str) -> None:
    (variant,) = [variant for variant in VARIANTS if variant.label == label]
    assert compare_with_masked_keys(model, eager, inputs, variant, 12) is None


@pytest.mark.parametrize(
    "wrong", [(("positions", "renumber"),), (("layer", 3),)], ids=["positions", "layer"]
)
def test_a_wrong_cut_is_found(
    model: Any, eager: Any, inputs: Any, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other positions than the mask has; and a mask that sets in one layer too early."""
    hide = bench_rows._hide
    if wrong[0][0] == "layer":
        monkeypatch.setattr(bench_rows, "_hide", lambda m, layer, cut: hide(m, layer - 1, cut))
    with pytest.raises(CheckFailed, match="differ from the masked keys"):
        compare_with_masked_keys(model, eager, inputs, Variant("fastv", wrong), 12)


# --- tiled pictures ------------------------------------------------------------------------------


def test_tiled_pictures_pass_the_same_checks() -> None:
    tiled = build_model("tiny-next", device="cpu", dtype=torch.float32)
    given = make_inputs(tiled, 2, before=6, after=4)
    assert given["pixel_values"].shape == (2, 5, 3, 84, 84)
    assert given["image_sizes"].tolist() == [[168, 168]] * 2
    assert (given["input_ids"] == tiled.config.image_token_id).sum(1).tolist() == [192, 192]
    for variant in TILED_VARIANTS:
        found = check_variant(tiled, given, variant, 40, given)
        assert found.reference == ("row alone" if variant.merged else "oracle")
        with variant.attach(tiled, 40) as attachment, torch.no_grad():
            cache = tiled(**given).past_key_values
            assert places(attachment) == ["PROJECTED"]
        assert cache.get_seq_length() == 40 + 10  # newline tokens left, too


def test_the_tiled_model_has_the_published_shape() -> None:
    """That of LLaVA-1.5-7B and one newline embedding."""
    plain, tiled = (
        build_model(name, device="meta", dtype=torch.bfloat16)
        for name in ("llava-1.5-7b", "llava-next-7b")
    )
    assert sum(p.numel() for p in tiled.parameters()) == 4096 + sum(
        p.numel() for p in plain.parameters()
    )
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert tiled.config.image_grid_pinpoints == pinpoints
