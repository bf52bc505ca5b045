"""The pruning benchmark on a tiny model: what it checks, what it measures, what it prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import vistoken

pytest.importorskip("transformers")

from vistoken.eval import bench_checks, bench_prune, bench_variants, results  # noqa: E402
from vistoken.eval import bench_prune_tables as tables  # noqa: E402
from vistoken.eval.bench_checks import compare_with_oracle, count_flops  # noqa: E402
from vistoken.eval.bench_models import (  # noqa: E402
    borders,
    build_model,
    find_size,
    make_inputs,
)
from vistoken.eval.bench_variants import SMOKE, VARIANTS, Variant  # noqa: E402
from vistoken.eval.timing import CheckFailed, quiet_heap  # noqa: E402

CPU = torch.device("cpu")
FEW = replace(SMOKE.at((12,)), variants=(VARIANTS[0], Variant("random")), repeats=2)
PICKING = (
    "spread",
    "holov",
    "cls_topk",
    "divprune",
    "zeroth_order",
    "random",
    "uniform",
    "pooling",
)
LEAST = {"warmup": 0, "repeats": 1, "rotation": 1, "decode_steps": 1, "generate_repeats": 1}
ONE = replace(FEW, batches=(1,), new_tokens=1, **LEAST)


@pytest.fixture(scope="module", autouse=True)
def heap() -> Iterator[None]:
    """What the suite has loaded is not collected again for every measurement."""
    with quiet_heap():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model("tiny", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, torch.Tensor]:
    return make_inputs(model, 2, before=6, after=4)


# --- models and inputs ---------------------------------------------------------------------------


def test_the_large_model_has_the_published_shape() -> None:
    """LLaVA-1.5-7B's parameters, counted from the architecture: 7.06 billion."""
    model = build_model("llava-1.5-7b", device="meta", dtype=torch.bfloat16)
    vision = 577 * 1024 + 1024 + 3 * 14 * 14 * 1024 + 2 * 2 * 1024
    vision += 24 * (4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024)
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    text = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 2 * 32064 * 4096
    assert sum(p.numel() for p in model.parameters()) == vision + projector + text
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert find_size("llava-1.5-7b").visual_tokens == 576


def test_flops_at_the_large_shape_are_those_of_the_counter() -> None:
    """On the meta device, where nothing is computed: 576 and 64 visual with 64 text tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build_model("llava-1.5-7b", device="meta", dtype=torch.bfloat16)
    saved = vistoken.inspect(model).savings[64]
    for name, visual in (("flops_dense", 576), ("flops", 64)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.get_image_features(torch.empty(1, 3, 336, 336, device="meta").bfloat16())
            embeds = torch.empty(1, visual + 64, 4096, device="meta", dtype=torch.bfloat16)
            model(inputs_embeds=embeds, logits_to_keep=1)
        assert saved[name] == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_equal_seeds_give_equal_models_and_the_global_generator_is_untouched() -> None:
    state = torch.get_rng_state()
    one, two = (build_model("tiny", device="cpu", dtype=torch.float32, seed=3) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_inputs_are_what_a_processor_gives(model: Any) -> None:
    given = make_inputs(model, 3, before=6, after=4, seed=1)
    image = given["input_ids"] == model.config.image_token_id
    assert image[:, 6:42].all() and image.sum() == 3 * 36
    assert given["input_ids"].shape == given["attention_mask"].shape == (3, 46)
    assert given["input_ids"].max() == model.config.image_token_id
    other = make_inputs(model, 3, before=6, after=4, seed=2)
    assert not torch.equal(given["input_ids"], other["input_ids"])
    assert not torch.equal(given["pixel_values"], other["pixel_values"])


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(vistoken.DataError, match="known sizes: llava-1.5-7b, llava-next-7b"):
        build_model("llava-9b", device="cpu", dtype=torch.float32)


def test_borders_are_crossed_in_order_and_hooks_go_away(model: Any, inputs: Any) -> None:
    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    crossed: list[str] = []
    with torch.no_grad():
        model(**inputs)  # transformers sets hooks of its own in the first call
        before = hooks()
        with borders(model, crossed.append):
            model(**inputs)
    assert crossed == ["tower", "select", "llm"]
    assert hooks() == before


# --- the checks before the clock -----------------------------------------------------------------


PICKED = [variant for variant in VARIANTS if variant.method in PICKING]


@pytest.mark.parametrize("variant", PICKED, ids=lambda v: v.label)
def test_every_variant_agrees_with_the_oracle_exactly(
    model: Any, inputs: Any, variant: Variant
) -> None:
    for keep in SMOKE.keeps:
        found = compare_with_oracle(model, inputs, variant, keep)
        assert found.logits == found.decode == found.budget == 0.0 and found.control > 0.1
    assert not vistoken.attachments(model)


def test_wrong_tokens_are_found(model: Any, inputs: Any, monkeypatch: Any) -> None:
    """The right tokens are reported, but their neighbours enter the LLM."""
    import vistoken.adapters.vlm_pipeline as pipeline

    gather = pipeline.gather_tokens
    monkeypatch.setattr(pipeline, "gather_tokens", lambda x, index: gather(x.roll(1, 1), index))
    with pytest.raises(CheckFailed, match="uniform at 12 tokens: logits differ from the oracle"):
        compare_with_oracle(model, inputs, Variant("uniform"), 12)


def test_wrong_positions_are_found(model: Any, inputs: Any) -> None:
    variant = Variant("uniform", (("positions", "original"),))
    with pytest.raises(CheckFailed, match="logits differ"):
        compare_with_oracle(model, inputs, variant, 12)


@pytest.mark.parametrize("extra", [-1, 1])
def test_wrong_counts_are_found(model: Any, inputs: Any, extra: int) -> None:
    class Off(Variant):
        def attach(self, model: Any, keep: int) -> Any:
            return super().attach(model, keep + extra)

    with pytest.raises(CheckFailed, match=rf"counts \[{12 + extra}, {12 + extra}\] kept tokens"):
        compare_with_oracle(model, inputs, Off("uniform"), 12)


def test_a_check_that_could_not_fail_is_refused(model: Any, inputs: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(bench_checks.BUDGETS, torch.float32, 2.0)
    with pytest.raises(CheckFailed, match="the check is blind"):
        compare_with_oracle(model, inputs, Variant("uniform"), 12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_found(bad: float) -> None:
    value = torch.ones(1, 2, 3)
    assert bench_checks.distance(value, value) == 0.0
    broken = value.clone()
    broken[0, 1, 2] = bad
    assert not bench_checks.distance(broken, value) <= 1e6


def test_counted_flops(model: Any, inputs: Any) -> None:
    dense = count_flops(model, inputs)
    with Variant("uniform").attach(model, 12) as attachment:
        counted, report = count_flops(model, inputs), attachment.report()
    assert dense == {"total": report.flops_dense, "select": 0}
    assert counted == {"total": report.flops, "select": 0}
    with VARIANTS[0].attach(model, 12) as attachment:
        counted, report = count_flops(model, inputs), attachment.report()
    assert counted["select"] > 0
    assert report.flops == counted["total"] - counted["select"]


# --- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run() -> Iterator[tuple[results.ResultFile, list[str]]]:
    said: list[str] = []
    yield bench_prune.run(FEW, CPU, said.append), said


def test_a_run_measures_every_configuration(run: tuple[results.ResultFile, list[str]]) -> None:
    result, said = run
    labels = ["dense", "spread", "random", "dense, again"]
    assert [(r["batch"], r["label"]) for r in result.rows] == [
        (batch, label) for batch in (1, 2) for label in labels
    ]
    for row in result.rows:
        ms = {name: timing["median"] for name, timing in row["ms"].items()}
        assert all(value > 0 for value in ms.values())
        assert max(ms["tower"], ms["llm"], ms["added"]) < ms["first_token"]
        assert row["memory"] is None
        assert ("decode" in ms) == ("generate" in ms) == (row["label"] in labels[:2])
    assert result.checks["undo_bit_equal"] and not tables.failures(result)
    assert result.checks["fp32_exact"]["compared"] == 4
    assert tables.goals(result) == []  # they are the large model's
    assert len(said) == 3 + len(result.rows)


def test_a_result_file_gives_all_tables(
    run: tuple[results.ResultFile, list[str]], tmp_path: Path
) -> None:
    run[0].write(tmp_path / "bench_prune.json")
    table = tables.readme_table(tmp_path)
    assert table.count("| dense |") == 2 and table.count("| random |") == 2
    assert "tiny LLaVA" in table and f"torch {torch.__version__}" in table
    methods = tables.methods_table(tmp_path)
    assert methods.count("\n| random | before the LLM |") == 1 and methods.count("| 12.0 |") == 2


def test_a_failed_row_has_its_reason_and_no_time(monkeypatch: Any) -> None:
    def refuse(model: Any, inputs: Any, variant: Variant, keep: int, several: Any) -> Any:
        raise CheckFailed("wrong [1, 2]")

    monkeypatch.setattr(bench_prune, "check_variant", refuse)
    result = bench_prune.run(replace(ONE, variants=FEW.variants[1:]), CPU, str)
    (row,) = [row for row in result.rows if row["method"]]
    assert row["failed"] == "wrong [1, 2]" and "ms" not in row
    assert any("wrong [1, 2]" in line for line in tables.failures(result))
    cells = tables.time_grid(result).rows[1]
    assert cells[2:4] == ["random", "failed"] and not any(cells[4:])
    assert tables.method_grid(result).rows[1] == ["random", "failed", *[""] * 6]


@dataclass(frozen=True)
class Leaves(Variant):
    """A method whose detach forgets something: one weight stays changed."""

    def attach(self, model: Any, keep: int) -> Any:
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1e-3
        return super().attach(model, keep)


def test_an_undo_that_is_not_exact_is_found() -> None:
    result = bench_prune.run(replace(ONE, variants=(Leaves("uniform"),)), CPU, str)
    assert tables.failures(result) == [
        "after detach the dense logits differ from those before the run"
    ]


# --- the command ---------------------------------------------------------------------------------


def invoke(*words: str) -> Any:
    app = typer.Typer()
    app.command()(bench_prune.main)
    return CliRunner().invoke(app, list(words))


def test_the_command_writes_json_and_leaves_the_real_results_alone(
    tmp_path: Path, monkeypatch: Any
) -> None:
    path = results.default_path("bench_prune")
    before = path.read_bytes() if path.exists() else None
    out, copy = tmp_path / "out.json", tmp_path / "copy.json"
    monkeypatch.setitem(bench_variants.PRESETS, "tiny", replace(ONE, variants=VARIANTS))
    found = invoke("--smoke", "--methods", "holov", "--out", str(out), "--json", str(copy))
    assert found.exit_code == 0, found.output
    assert out.read_text() == copy.read_text()
    modes = ["holov (paper)", "holov (released)", "holov (paper-2d)"]
    assert results.load(out, "bench_prune").settings["methods"] == modes
    assert (path.read_bytes() if path.exists() else None) == before
    last = found.stdout.rstrip().rpartition("prefill and decode")[2]
    assert modes[0] in last and modes[1] not in last  # the compact table comes last


def test_json_on_standard_output_is_nothing_but_json(
    run: tuple[results.ResultFile, list[str]], monkeypatch: Any
) -> None:
    monkeypatch.setattr(bench_prune, "run", lambda settings, device, say: run[0])
    found = invoke("--smoke", "--json", "-")
    assert json.loads(found.stdout) == json.loads(run[0].to_json())
    assert "prefill and decode" in found.stderr


def test_a_failed_check_fails_the_command(
    run: tuple[results.ResultFile, list[str]], monkeypatch: Any
) -> None:
    bad = replace(run[0], checks={**run[0].checks, "undo_bit_equal": False})
    monkeypatch.setattr(bench_prune, "run", lambda settings, device, say: bad)
    found = invoke("--smoke")
    assert found.exit_code == 1
    assert "FAILED after detach the dense logits differ" in found.stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--methods", "holo", "--smoke"), "no benchmark for holo; known: adaptinfer"),
        (("--device", "cuba"), "'cuba' is no torch device"),
        (("--device", "cpu", "--keep", "64,a"), "got '64,a'"),
        (("--device", "cpu", "--model", "llava-9b"), "known sizes"),
        pytest.param(
            (),
            "--smoke runs a tiny model on the CPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs to lack a GPU"),
        ),
    ],
)
def test_bad_input_is_refused(words: tuple[str, ...], why: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(bench_prune.results, "default_path", lambda name: Path("unused.json"))
    found = invoke(*words)
    assert found.exit_code == 2 and why in found.output
    assert not Path("unused.json").exists()
