"""The accuracy scoreboard: its numbers are those of answers scored by hand."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import vistoken
from vistoken.eval import results, scoreboard, scoreboard_tables
from vistoken.eval.scoreboard import SCORED, SceneResult, Settings
from vistoken.eval.scoreboard_questions import SceneRow, ask, by_picture, score, versus_measure

pytest.importorskip("transformers")
pytest.importorskip("PIL")

SETTINGS = Settings(methods=("uniform", "random"), keeps=(16, 576), questions=7, seeds=2)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return vistoken.load_shipped("tiny-llava")


@pytest.fixture(scope="module")
def measured(shipped: tuple[Any, Any]) -> tuple[results.ResultFile, dict[str, int]]:
    """A small run, and how many answers it said it had given, by label."""
    seen: dict[str, int] = {}

    def watch(label: str, done: int) -> None:
        seen[label] = seen.get(label, 0) + done

    return scoreboard.run(*shipped, SETTINGS, watch), seen


def test_accuracies_are_those_of_generate(
    measured: tuple[results.ResultFile, dict[str, int]], shipped: tuple[Any, Any]
) -> None:
    """Each question by itself, through `generate`, compared with its answer word by word."""
    from vistoken.eval.scenes import draw, make_scenes, questions

    model, processor = shipped
    asked = [(s, q) for s in make_scenes(2) for q in questions(s, tasks=SCORED)][:7]

    def right() -> list[bool]:
        found = []
        for scene, question in asked:
            prompt = f"USER: <image>\n{question.text} ASSISTANT:"
            inputs = processor(images=draw(scene), text=prompt, return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :]
            said = processor.decode(new, skip_special_tokens=True)
            found.append(said.split() == question.answer.split())
        return found

    dense, uniform, chance = measured[0].rows
    assert dense["accuracy"] == pytest.approx(sum(right()) / 7, abs=1e-4)
    with vistoken.prune_visual_tokens(model, keep=16, method="uniform"):
        hits = right()
    assert uniform["accuracy"] == pytest.approx(sum(hits) / 7, abs=1e-4)
    for task in SCORED:
        mine = [hit for hit, (_, q) in zip(hits, asked, strict=True) if q.task == task]
        assert uniform["tasks"][task] == pytest.approx(sum(mine) / max(1, len(mine)), abs=1e-4)
    seeds = []
    for seed in (0, 1):
        with vistoken.prune_visual_tokens(model, keep=16, method="random", seed=seed):
            seeds += right()
    assert chance["accuracy"] == pytest.approx(sum(seeds) / 14, abs=1e-4)


def test_rows_say_what_was_measured(measured: tuple[results.ResultFile, dict[str, int]]) -> None:
    result, seen = measured
    assert [(r["method"], r["keep"], r["seeds"]) for r in result.rows] == [
        (None, 576, 1),
        ("uniform", 16, 1),
        ("random", 16, 2),
    ]
    assert seen == {"all tokens": 7, "uniform, 16 tokens": 7, "random, 16 tokens": 14}
    assert sum(seen.values()) == scoreboard.work(SETTINGS, 576)
    assert result.checks == {"answers_compared_with_generate": 14, "answers_equal": True}
    dense, uniform, _ = result.rows
    assert dense["difference"]["value"] == 0
    change = uniform["difference"]
    assert change["value"] == pytest.approx(uniform["accuracy"] - dense["accuracy"], abs=2e-4)
    for row in result.rows:
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
    assert uniform["flops"] < dense["flops"] and uniform["kv_bytes"] < dense["kv_bytes"] / 5


def test_the_model_is_bare_after_a_run(shipped: tuple[Any, Any], measured: Any) -> None:
    assert vistoken.attachments(shipped[0]) == ()


def test_result_files_are_valid(
    measured: tuple[results.ResultFile, dict[str, int]], tmp_path: Path
) -> None:
    path = measured[0].write(tmp_path / "scoreboard.json")
    assert results.load(path, "scoreboard").rows == json.loads(path.read_text())["rows"]
    markdown = scoreboard_tables.readme_table(tmp_path)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert lines[0] == "| visual tokens | 576 | 16 |"
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:5]] == [
        "bare model",
        "uniform",
        "random (2 seeds)",
    ]
    assert "7 questions" in markdown and "torch" in markdown


def test_tables_fit_a_terminal(measured: tuple[results.ResultFile, dict[str, int]]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(scoreboard_tables.overview(measured[0]))
    shown = console.export_text()
    assert "…" not in shown and "random (2 seeds)" in shown and "±" in shown
    console.print(scoreboard_tables.details(measured[0]).to_rich())


def test_a_wrong_fast_path_stops_the_run(
    shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, **kwargs: Any) -> list[list[str]]:
        return [["seven"] * 6, ["seven"]]

    monkeypatch.setattr(scoreboard, "answer", wrong)
    with pytest.raises(vistoken.VistokenError, match="differ from those of generate"):
        scoreboard.run(*shipped, SETTINGS)


def test_metrics_of_totals() -> None:
    rows = [
        SceneRow(id=i, group=i // 2, task=task, truth="a", answer="a", correct=hit)
        for i, (task, hit) in enumerate([("color", True), ("color", False), ("count", True)])
    ]
    totals = SceneResult.tally(rows)
    assert dict(zip(SceneResult.totals, totals, strict=True)) == {
        **{name: 0 for name in SceneResult.totals},
        **{"right_color": 1, "asked_color": 2, "right_count": 1, "asked_count": 1},
    }
    metrics = SceneResult.measure(totals)
    assert math.isclose(metrics["accuracy"], 2 / 3) and metrics["color"] == 0.5
    assert metrics["exists"] == 0


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("no method 'holow'", ["--methods", "holow"]),
        ("whole numbers with commas", ["--keep", "64,many"]),
        ("keep must be at least 1", ["--keep", "0"]),
        ("negatives must be one of", ["--negatives", "none"]),
    ],
)
def test_bad_settings_are_refused(words: str, arguments: list[str]) -> None:
    import typer

    app = typer.Typer()
    app.command()(scoreboard.main)
    result = CliRunner().invoke(app, ["--questions", "2", *arguments])
    assert result.exit_code == 2 and words in result.stderr
    assert result.stdout == ""


def test_text_followers_read_the_picture_for_every_question(shipped: tuple[Any, Any]) -> None:
    """FastV sees the question, so its answers must be those of `generate`, not of a prefix."""
    model, processor = shipped
    settings = Settings(methods=("fastv",), keeps=(16,), questions=5)
    with vistoken.prune_visual_tokens(model, keep=16, method="fastv"):
        from vistoken.eval.answers import shares_prefix

        assert not shares_prefix(model)
    with vistoken.prune_visual_tokens(model, keep=16, method="spread"):
        assert shares_prefix(model)
    result = scoreboard.run(model, processor, settings)
    assert result.checks["answers_equal"]
    (row,) = result.rows[1:]
    assert 16 < row["mean_tokens"] < 576


def test_versus_is_paired_by_picture(shipped: tuple[Any, Any]) -> None:
    """Recomputed by hand from the answers of both methods, on yes/no and color alone."""
    model, processor = shipped
    settings = Settings(
        methods=("uniform", "spread"), versus="spread", keeps=(4,), questions=12, scene_seeds=2
    )
    result = scoreboard.run(model, processor, settings)
    uniform, spread = result.rows[1:]
    assert "versus" not in spread
    asked = ask(processor, settings)
    assert sum(len(row) for row in asked.questions) == 12
    assert len({row[0].image_id // 10_000_000 for row in asked.questions}) == 2
    shares = []
    for method in ("uniform", "spread"):
        with vistoken.prune_visual_tokens(model, keep=4, method=method):
            given = scoreboard.answer(model, processor, asked.exam, max_new_tokens=8)
        rows = score(asked, [given], settings).rows
        some = [row.correct for row in rows if row.task in ("exists", "color")]
        shares.append(sum(some) / len(some))
        assert versus_measure(
            [sum(t) for t in zip(*by_picture(score(asked, [given], settings), 1), strict=True)]
        )["accuracy"] == pytest.approx(shares[-1])
    assert uniform["versus"]["value"] == pytest.approx(shares[1] - shares[0], abs=1e-4)
    low, high = uniform["versus"]["interval"]
    assert low <= uniform["versus"]["value"] <= high
