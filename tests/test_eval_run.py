"""The evaluation runner: resuming, sharing the work, neutral methods, reports, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vistoken
from vistoken.errors import AttachError, DataError, MethodError
from vistoken.eval import results
from vistoken.eval.run import app, evaluate
from vistoken.eval.run_model import BARE, make_configurations
from vistoken.eval.run_report import differences, failures, to_markdown
from vistoken.eval.run_setup import fingerprint, load, prompt_writer
from vistoken.eval.tasks import Protocol

ROOT = Path(__file__).resolve().parents[1]
GRID = 6  # 36 visual tokens
FAST = Protocol(answer_tokens=3, caption_tokens=5, resamples=50)
PLOTS = ("accuracy_tokens.png", "accuracy_time.png", "chair_recall.png")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are so small that a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA with the words of the shipped one, as a checkpoint folder."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    _, processor = vistoken.load_shipped()
    processor.patch_size = 336 // GRID
    words = len(processor.tokenizer)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=336,
        patch_size=processor.patch_size,
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=words,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
    )
    torch.manual_seed(0)
    model = Llava(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15)
    model.generation_config.pad_token_id = 0
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    return load(str(checkpoint), "cpu")


def run(loaded: tuple[Any, Any], **settings: Any) -> results.ResultFile:
    wanted = {"images": 5, "batch": 2, "protocol": FAST, **settings}
    return evaluate(*loaded, **wanted)


def figures(report: results.ResultFile) -> list[Any]:
    """What must not depend on the machine, on the clock or on who did the work."""
    return [
        {key: value for key, value in row.items() if key != "seconds_per_picture"}
        for row in report.rows
    ]


def lines(folder: Path) -> dict[str, list[str]]:
    """The answers in a folder, by configuration, without times."""
    found: dict[str, list[str]] = {}
    for path in sorted((folder / "answers").iterdir()):
        for text in path.read_text().splitlines()[1:]:
            line = json.loads(text)
            answers = f"{line['unit']} {line['answers']}"
            found.setdefault(path.name.rsplit(".", 2)[0], []).append(answers)
    return {name: sorted(answers) for name, answers in found.items()}


# --- what comes out ------------------------------------------------------------------------------


def test_report_holds_what_a_reader_needs(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    report = run(loaded, compare=True, methods=["holov"], keeps=[4, 9], out=tmp_path, name="tiny")
    assert [(row["role"], row["tokens"]) for row in report.rows] == [
        ("bare", 36), ("method", 4), ("method", 9), ("control", 4), ("control", 9)
    ]  # fmt: skip
    asked = report.settings
    assert asked["model"] == "tiny" and asked["dtype"] == "float32"
    assert asked["pictures"] == 5 and asked["items"]["chair"] == 5
    assert asked["protocol"]["parser"] == "first-word" and asked["decoding"] == "greedy"
    assert asked["protocol"]["answer_tokens"] == 3 and len(asked["prompts_sha256"]) == 64
    assert "seed 0" in asked["data_revision"] and asked["pope_per_image"] == 1
    assert {"torch", "transformers", "vistoken"} <= set(report.machine["versions"])
    bare, method, *_ = report.rows
    assert "against_bare" not in bare and set(method) >= {"against_bare", "against_random"}
    assert method["flops"] < bare["flops"] and method["kv_bytes"] < bare["kv_bytes"]
    assert {"n", "empty", "unparsed", "parsed"} <= set(method["results"]["vqa"])
    assert report.checks["answers_equal"] == report.checks["answers_compared_with_generate"] == 15
    saved = results.load(tmp_path / "report.json", "eval")
    assert figures(saved) == json.loads(json.dumps(figures(report)))
    text = (tmp_path / "report.md").read_text()
    for part in ("holov(keep=4)", "McNemar", "unparsed", asked["prompts_sha256"][:12], *PLOTS):
        assert part in text
    for name in PLOTS:
        with Image.open(tmp_path / name) as plot:
            assert plot.width > 500 and len(plot.convert("RGB").getcolors(1 << 24)) > 50
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert len(items) == sum(asked["items"].values())
    assert set(items[0]["answers"]) == {row["configuration"] for row in report.rows}


def test_neutral_method_is_the_bare_model(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    report = run(loaded, methods=["holov"], keeps=[36], compare=True, out=tmp_path)
    bare, neutral, _ = figures(report)
    assert neutral["results"] == bare["results"]
    answers = lines(tmp_path)
    assert len({tuple(found) for found in answers.values()}) == 1
    for found in neutral["against_bare"].values():
        assert all(change["value"] == 0 for change in found["differences"].values())


def test_reading_says_which_way_is_better(loaded: tuple[Any, Any]) -> None:
    report = run(loaded, methods=["holov"], keeps=[4], compare=True, images=3)
    change = {"value": -0.2, "interval": {"low": -0.3, "high": -0.1}, "p_value": 0.01}
    for found in report.rows[1]["against_bare"].values():
        for name in found["differences"]:
            found["differences"][name] = change
    grid = differences(report, "against_bare")
    assert grid is not None
    read = {row[1]: row[-1] for row in grid.rows if row[0] == "holov(keep=4)"}
    assert read["CHAIR_i"] == read["CHAIR_s"] == "better"
    assert read["recall"] == read["POPE accuracy"] == read["VQA accuracy"] == "worse"
    assert "length" not in read and "yes-ratio" not in read


def test_a_shorter_limit_gives_the_beginning_of_a_longer_one(loaded: tuple[Any, Any]) -> None:
    """Prompts with different limits share one reading; `generate` alone is the oracle."""
    report = run(loaded, protocol=Protocol(answer_tokens=1, caption_tokens=9, resamples=0))
    assert report.checks["answers_equal"] == report.checks["answers_compared_with_generate"] == 3
    apart = run(loaded, protocol=Protocol(answer_tokens=1, caption_tokens=129, resamples=0))
    assert apart.checks["answers_equal"] == 3


def test_other_ways_of_decoding_use_generate(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = run(loaded, methods=["cls_topk"], keeps=[9])
    monkeypatch.setattr("vistoken.eval.run_model.shares_prefix", lambda model: False)
    slow = run(loaded, methods=["cls_topk"], keeps=[9])
    assert figures(slow) == figures(fast)


# --- resuming ------------------------------------------------------------------------------------


def test_resumed_run_is_the_uninterrupted_one(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    whole = run(loaded, compare=True, keeps=[4], out=tmp_path / "whole")
    calls = []

    def stop_soon(answers: int) -> None:
        calls.append(answers)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(loaded, compare=True, keeps=[4], out=tmp_path / "torn", watch=stop_soon)
    assert not (tmp_path / "torn" / "report.json").exists()
    for path in (tmp_path / "torn" / "answers").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-7])  # as if the machine had stopped while it wrote
    seen: list[int] = []
    started: list[tuple[int, int]] = []
    again = run(
        loaded,
        compare=True,
        keeps=[4],
        out=tmp_path / "torn",
        watch=seen.append,
        on_start=lambda known, total: started.append((known, total)),
    )
    assert figures(again) == figures(whole)
    assert lines(tmp_path / "torn") == lines(tmp_path / "whole")
    ((known, total),) = started
    assert known and known + sum(seen) == total
    assert len(seen) == 9 - 2, "three units of three configurations, two of them kept whole"
    nothing: list[int] = []
    run(loaded, compare=True, keeps=[4], out=tmp_path / "torn", watch=nothing.append)
    assert nothing == []


def test_answers_of_another_run_are_refused(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    run(loaded, images=2, tasks=["vqa"], out=tmp_path)
    with pytest.raises(DataError, match=r"bare-model.*jsonl:1: .*another items.*choose another"):
        run(loaded, images=3, tasks=["vqa"], out=tmp_path)
    with pytest.raises(DataError, match="another unit"):
        run(loaded, images=2, tasks=["vqa"], out=tmp_path, batch=1)
    weight = loaded[0].get_output_embeddings().weight
    old = weight.data.clone()
    try:
        weight.data += 1e-3
        with pytest.raises(DataError, match="another model"):
            run(loaded, images=2, tasks=["vqa"], out=tmp_path)
    finally:
        weight.data.copy_(old)
    run(loaded, images=2, tasks=["vqa"], out=tmp_path)


# --- several processes ---------------------------------------------------------------------------


def test_two_processes_give_the_result_of_one(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    arguments = [
        *("--model", str(checkpoint), "--images", "5", "--batch", "2", "--method", "holov"),
        *("--keep", "4", "--compare", "--answer-tokens", "3", "--caption-tokens", "5"),
        *("--device", "cpu"),
    ]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "one")])
    assert done.exit_code in (0, 1), done.output
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    ports = ["--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no"]
    told = subprocess.run(
        [sys.executable, *launch, *ports, "--dynamo_backend", "no", "-m", "vistoken.eval.run"]
        + [*arguments, "--out", str(tmp_path / "two"), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (tmp_path / "two" / "report.json").exists(), told.stderr[-3000:]
    started = CliRunner().invoke(
        app, [*arguments, "--out", str(tmp_path / "own"), "--processes", "2"]
    )
    assert started.exit_code == done.exit_code, started.output
    one, two, own = (
        results.load(tmp_path / name / "report.json") for name in ("one", "two", "own")
    )
    assert figures(own) == figures(one) and own.settings["processes"] == 2
    assert lines(tmp_path / "own") == lines(tmp_path / "one")
    assert (one.settings.pop("processes"), two.settings.pop("processes")) == (1, 2)
    assert figures(one) == figures(two) and one.settings == two.settings
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    by_process = {p.name.rsplit(".", 2)[1] for p in (tmp_path / "two" / "answers").iterdir()}
    assert by_process == {"0", "1"}, "both did some of the work"
    assert told.stdout.count('"benchmark": "eval"') == 1, "one process prints"


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--task", "mmlu"], "there is no task 'mmlu'"),
        (["--data", "coco:/nowhere"], "does not exist"),
        (["--data", "hub:coco"], "allowed: scenes"),
        (["--model", "/nowhere"], "no checkpoint folder"),
        (["--keep", "4,x"], "--keep takes numbers"),
        (["--parser", "x"], "parser is 'x'"),
        (["--device", "quantum"], "no device 'quantum'"),
        (["--dtype", "int4"], "dtype is 'int4'"),
        (["--method", "nosuch"], "no method 'nosuch'"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--processes", "2", "--device", "cuda"], "--processes is for the CPU"),
    ],
)
def test_commands_fail_with_one_line(arguments: list[str], why: str) -> None:
    done = CliRunner().invoke(app, [*arguments, "--images", "1"])
    assert done.exit_code == 2 and why in done.stderr, done.output
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_parsed_answer_fails_after_the_report(checkpoint: Path, tmp_path: Path) -> None:
    """A random model never says yes or no in one token here, and exits with 1."""
    arguments = ["--model", str(checkpoint), "--images", "3", "--task", "pope", "--json"]
    template = ["--template", "<image>\\n{question}", "--answer-tokens", "1"]
    done = CliRunner().invoke(app, [*arguments, *template, "--out", str(tmp_path)])
    assert done.exit_code == 1 and "no answer could be parsed: bare model, pope" in done.stderr
    report = results.load(tmp_path / "report.json", "eval")
    assert failures(report)[0] == "bare model, pope"
    assert report.rows[0]["results"]["pope"]["unparsed"] == report.rows[0]["results"]["pope"]["n"]
    assert json.loads(done.stdout)["benchmark"] == "eval"


def test_a_model_with_something_attached_is_refused(loaded: tuple[Any, Any]) -> None:
    with (
        vistoken.prune_visual_tokens(loaded[0], keep=4),
        pytest.raises(AttachError, match=r"spread\(keep=4\) attached"),
    ):
        run(loaded)


def test_configurations(loaded: tuple[Any, Any]) -> None:
    def labels(*methods: str, **settings: Any) -> list[str]:
        return [c.label for c in make_configurations(loaded[0], methods, **settings)]

    assert labels() == [BARE]
    assert labels(compare=True) == [BARE, "spread(keep=4)", "random(keep=4)"]
    assert labels("holov", "uniform", keeps=[2, 4]) == [
        "holov(keep=2)", "holov(keep=4)", "uniform(keep=2)", "uniform(keep=4)"
    ]  # fmt: skip
    assert labels("random", ratios=[0.5], compare=True) == [BARE, "random(ratio=0.5)"]
    mixed = labels("holov", "uniform", keeps=[4], options=["holov.mode=released"])
    assert mixed == ["holov(keep=4, mode='released')", "uniform(keep=4)"]
    for bad in (
        {"keeps": [4], "ratios": [0.5]},
        {"options": ["mode"]},
        {"options": ["uniform.mode=x"]},
        {"options": ["nosuch=1"]},
        {"keeps": [0]},
    ):
        with pytest.raises(MethodError):
            labels("holov", **bad)


def test_prompts_need_the_placeholder_and_the_question(loaded: tuple[Any, Any]) -> None:
    processor = loaded[1]
    assert prompt_writer(processor)("why?") == "USER: <image>\nwhy? ASSISTANT:"
    for template in ("{question}", "<image>", "<image><image>{question}"):
        with pytest.raises(DataError, match="must hold <image> once"):
            prompt_writer(processor, template)


def test_fingerprint_sees_weights_and_not_the_folder(
    loaded: tuple[Any, Any], checkpoint: Path
) -> None:
    model = loaded[0]
    assert fingerprint(load(str(checkpoint), "cpu")[0]) == fingerprint(model)
    bias = model.get_output_embeddings().weight
    bias.data[0, 0] += 1
    try:
        assert fingerprint(load(str(checkpoint), "cpu")[0]) != fingerprint(model)
    finally:
        bias.data[0, 0] -= 1


def test_markdown_without_a_comparison(loaded: tuple[Any, Any]) -> None:
    report = run(loaded, images=1, tasks=["chair"])
    text = to_markdown(report)
    assert "Against" not in text and "CHAIR_i" in text and "POPE" not in text
