"""The documents' code runs as printed, and their tables are those of the result files."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import vistoken
import vistoken.pruning

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.M | re.S)


def test_readme_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from vistoken.eval.scenes import draw, make_scene

    llava, processor = vistoken.load_shipped("tiny-llava")
    text = "USER: <image>\nis there a star in the image? ASSISTANT:"
    inputs = processor(text=text, images=draw(make_scene(1)), return_tensors="pt")
    before = llava.generate(**inputs, max_new_tokens=4)
    found = blocks(README, "python")
    assert len(found) == 4
    space: dict[str, Any] = {"llava": llava, "inputs": inputs}
    for code in found:
        exec(compile(code, str(README), "exec"), space)
    assert torch.equal(llava.generate(**inputs, max_new_tokens=4), before)
    said = capsys.readouterr().out
    assert "576 -> 63" in said and "576 -> 64" in said
    assert "holov training-free" in said


def test_readme_lists_the_methods_there_are() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", README.read_text(), re.M)
    assert sorted(listed) == sorted(vistoken.method_names("pruning"))


def test_readme_names_commands_that_exist() -> None:
    from typer.testing import CliRunner

    from vistoken.commands.main import app

    for code in blocks(README, "bash"):
        for line in re.findall(r"^vistoken (\w+)", code, re.M):
            assert CliRunner().invoke(app, [line, "--help"]).exit_code == 0, line
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks(README, "bash")), re.M):
        assert f"\n{target}:" in makefile


def test_readme_tables_are_fresh() -> None:
    from vistoken.eval.tables import update

    assert not update(README, check=True), "run: python -m vistoken.eval.tables README.md"


def test_readme_links_and_pictures_exist() -> None:
    for document in (README, CONTRIBUTING):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (ROOT / target).exists(), target


def test_the_method_in_contributing_works(tmp_path: Path, monkeypatch: Any) -> None:
    (code,) = blocks(CONTRIBUTING, "python")
    (tmp_path / "norm.py").write_text(code)
    monkeypatch.setattr(vistoken.pruning, "__path__", [*vistoken.pruning.__path__, str(tmp_path)])
    model = tiny.tiny_llava()
    inputs = tiny.one_image()
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    try:
        with vistoken.prune_visual_tokens(model, keep=5, method="norm", p=1.0) as att:
            model(**inputs)
            kept = att.report().kept[0]
    finally:
        sys.modules.pop("vistoken.pruning.norm", None)
    assert torch.equal(kept, features.abs().sum(-1).topk(5).indices.sort().values)
