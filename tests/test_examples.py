"""Examples that no other test runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vistoken

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import cuda_graph_prefill as example  # noqa: E402
from vistoken.eval import bench_graph, results  # noqa: E402
from vistoken.eval.bench_models import build_model, make_inputs  # noqa: E402


def test_the_graph_example_on_the_cpu(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "bench_graph.json"
    example.main(["--tiny", "--repeats", "2", "--out", str(out)])
    said = capsys.readouterr().out
    assert "times as fast" in said and "12 tokens, eager" in said
    result = results.load(out, "bench_graph")
    assert [row["label"].split(",")[0] for row in result.rows] == ["dense", *["12 tokens"] * 2]
    assert result.checks["logits"] <= result.checks["budget"] < result.checks["control"]
    assert bench_graph.readme_table(tmp_path).count("×") == 6


def test_the_graph_example_needs_a_gpu_for_the_large_model(capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs to lack a GPU")
    with pytest.raises(SystemExit):
        example.main([])
    assert "--tiny" in capsys.readouterr().err


def test_a_graphed_prefill_goes_on_to_decode_and_leaves_the_model_as_it_was() -> None:
    """Two pictures in turn through one capture; the cache serves the next step; exact undo."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model("tiny", device=device, dtype=torch.float32)
    inputs = [make_inputs(model, 1, before=6, after=4, seed=seed) for seed in range(2)]
    with torch.no_grad():
        dense = model(**inputs[0]).logits
        with vistoken.prune_visual_tokens(model, keep=9, method="spread"):
            first = example.short_prompt(model, inputs[0])
            assert first[0].shape == (1, 19, 64) and first[1].tolist() == [list(range(19))]
            prefill, cache = example.graphed_prefill(model, *first, room=2)
            for given in (*inputs, inputs[0]):
                eager = model(**given)
                logits = prefill(*example.short_prompt(model, given)).clone()
                assert torch.allclose(logits, eager.logits[:, -1], atol=1e-5)
                token = logits.argmax(-1, keepdim=True)
                place = torch.full_like(token, 19)
                wanted = model(input_ids=token, past_key_values=eager.past_key_values).logits
                step = model(input_ids=token, past_key_values=cache, position_ids=place).logits
                assert torch.allclose(step, wanted, atol=1e-5)
        assert torch.equal(model(**inputs[0]).logits, dense)
    assert not model.model.language_model._forward_pre_hooks


def test_an_error_on_the_way_leaves_no_hook() -> None:
    model = build_model("tiny", device="cpu", dtype=torch.float32)
    given = {**make_inputs(model, 1), "pixel_values": torch.zeros(1, 3, 7, 7)}
    with (
        vistoken.prune_visual_tokens(model, keep=9, method="spread"),
        pytest.raises((RuntimeError, ValueError)),
    ):
        example.short_prompt(model, given)
    assert not model.model.language_model._forward_pre_hooks
