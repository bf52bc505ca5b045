"""Result files carry where they come from, and documents hold the tables that they give."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import vistoken
from vistoken.errors import DataError
from vistoken.eval import results, tables
from vistoken.eval.results import ResultFile
from vistoken.eval.tables import Grid, make_table, replace_tables, update

MACHINE = {
    "device": "Some GPU",
    "driver": "1.2",
    "python": "3.12.3",
    "versions": {"vistoken": "0.1.0", "torch": "2.11", "transformers": None},
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
}
RESULT = ResultFile("bench_x", MACHINE, {"keep": 64}, [{"ms": 1.5}, {"ms": 2.5}], {"ok": True})


# --- the machine ---------------------------------------------------------------------------------


def test_the_machine_says_what_ran() -> None:
    facts = results.machine("cpu")
    assert list(facts) == list(MACHINE)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["vistoken"] == vistoken.__version__
    assert facts["device"].startswith("CPU") and facts["driver"] is None
    assert facts["date"].endswith("+00:00")
    json.dumps(facts)


def test_the_machine_line_is_complete_and_leaves_out_what_is_not_there() -> None:
    line = results.machine_line(MACHINE)
    assert line == (
        "Some GPU (driver 1.2), Python 3.12.3, vistoken 0.1.0, torch 2.11, commit 0123456789, "
        "2026-01-02"
    )
    unknown = {**MACHINE, "driver": None, "commit": None, "dirty": None}
    assert "driver" not in results.machine_line(unknown)
    assert "unknown commit" in results.machine_line(unknown)
    assert "0123456789 with changes" in results.machine_line({**MACHINE, "dirty": True})


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository that `results` takes for the one it lies in."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    git(tmp_path, "init", "-q")
    (tmp_path / "eval" / "results").mkdir(parents=True)
    (tmp_path / "a.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "first")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "eval" / "results.py"))
    monkeypatch.delenv(results.COMMIT_VARIABLE, raising=False)
    return tmp_path


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_commit_and_changes(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert (results.machine()["commit"], results.machine()["dirty"]) == (head, False)
    (checkout / "eval" / "results" / "new.json").write_text("{}")
    assert results.machine()["dirty"] is False  # a result file changes nothing that was measured
    (checkout / "a.py").write_text("2\n")
    assert results.machine()["dirty"] is True


def test_a_repository_around_an_installation_is_not_ours(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = checkout / "site-packages" / "eval"
    inside.mkdir(parents=True)
    monkeypatch.setattr(results, "__file__", str(inside / "results.py"))
    assert results.machine()["commit"] is None
    monkeypatch.setenv(results.COMMIT_VARIABLE, "abc+dirty")
    assert (results.machine()["commit"], results.machine()["dirty"]) == ("abc", True)
    monkeypatch.setenv(results.COMMIT_VARIABLE, "abc")
    assert (results.machine()["commit"], results.machine()["dirty"]) == ("abc", False)


# --- files ---------------------------------------------------------------------------------------


@dataclass
class Point:
    x: float


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = RESULT.write(tmp_path / "new" / "bench_x.json")
    assert results.load(path, "bench_x") == RESULT
    nested = replace(RESULT, checks={"points": (Point(1.0), Point(2.0))})
    assert results.load(nested.write(path)).checks == {"points": [{"x": 1.0}, {"x": 2.0}]}


@pytest.mark.parametrize("value", [math.nan, math.inf, Path("x"), torch.zeros(1)])
def test_what_json_does_not_know_is_refused_before_the_file_is_touched(
    tmp_path: Path, value: Any
) -> None:
    path = RESULT.write(tmp_path / "x.json")
    with pytest.raises(DataError, match="bench_x cannot be written"):
        replace(RESULT, rows=[{"ms": value}]).write(path)
    assert results.load(path) == RESULT


def plain(**changes: Any) -> dict[str, Any]:
    return {**json.loads(RESULT.to_json()), **changes}


BROKEN = [
    ("not json", "cannot be read as a JSON"),
    ("[]", "must hold a JSON object, not list"),
    (json.dumps(plain(schema=9)), "its schema is 9, this version reads 1"),
    (json.dumps(plain(benchmark="bench_y")), "written by 'bench_y', not by 'bench_x'"),
    (json.dumps(plain(machine={"device": "x"})), "lacks driver, python"),
    (json.dumps(plain(rows=[{}, 3])), "'rows' must hold objects, found 3"),
    (json.dumps(plain(rows=None)), "'rows' must be list"),
    (json.dumps(plain(extra=1)), "unknown field 'extra'"),
    ("{}", "'schema' must be int; 'benchmark' must be str"),
]


@pytest.mark.parametrize(("text", "why"), BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "bench_x.json"
    path.write_text(text)
    with pytest.raises(DataError, match="bench_x.json") as error:
        results.load(path, "bench_x")
    assert why in str(error.value)


def test_a_missing_file_names_the_program_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="python -m vistoken.eval.bench_x"):
        results.load(tmp_path / "gone.json", "bench_x")


# --- tables --------------------------------------------------------------------------------------


def test_a_grid_in_markdown_and_on_a_terminal() -> None:
    grid = Grid("Title", ("<Method", "ms"), [["a|b", "1.5"], ["c", "10"]], "A note.")
    assert grid.to_markdown() == (
        "| Method | ms |\n| :-- | --: |\n| a\\|b | 1.5 |\n| c | 10 |\n\nA note."
    )
    console = Console(width=60)
    with console.capture() as capture:
        console.print(grid.to_rich())
    shown = capture.get()
    assert "Title" in shown and "a|b" in shown and "A note." in shown and "<" not in shown


def test_an_uneven_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Grid("t", ("a", "b"), [["1", "2"], ["3"]])


TEXT = """# Title
<!-- table:one -->
old
<!-- /table:one -->
between <!-- table:two --><!-- /table:two --> after
"""


def test_only_what_lies_between_markers_changes() -> None:
    made = replace_tables(TEXT, lambda name: f"| {name} |\n")
    assert made == (
        "# Title\n<!-- table:one -->\n| one |\n<!-- /table:one -->\n"
        "between <!-- table:two -->\n| two |\n<!-- /table:two --> after\n"
    )
    assert replace_tables(made, lambda name: f"| {name} |") == made


@given(st.text(), st.text(), st.text("| \n-:ab"))
def test_text_around_a_table_survives(before: str, after: str, table: str) -> None:
    marked = f"{before}<!-- table:t -->\nold<!-- /table:t -->{after}"
    expected = f"{before}<!-- table:t -->\n{table.strip()}\n<!-- /table:t -->{after}"
    assert replace_tables(marked, lambda name: table) == expected
    assert replace_tables(before, lambda name: table) == before


@pytest.mark.parametrize(
    ("text", "line", "marker"),
    [
        ("x\n<!-- table:a -->\n", 2, "<!-- table:a -->"),
        ("<!-- /table:a -->", 1, "<!-- /table:a -->"),
        ("<!-- table:a -->\n<!-- /table:b -->", 1, "<!-- table:a -->"),
        ("\n\n<!-- table:a -->\n<!-- table:b --><!-- /table:b -->", 3, "<!-- table:a -->"),
    ],
)
def test_markers_without_a_partner_are_refused(text: str, line: int, marker: str) -> None:
    with pytest.raises(DataError, match="has no partner") as error:
        replace_tables(text, lambda name: "", source="doc.md")
    assert str(error.value).startswith(f"doc.md:{line}: {marker} ")


def table_of_rows(folder: Path) -> str:
    """A table maker, as a benchmark registers it."""
    result = results.load(folder / "bench_x.json", "bench_x")
    return Grid("", ("ms",), [[str(row["ms"])] for row in result.rows]).to_markdown()


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A document with one table, and in the same folder the result file it is made from."""
    monkeypatch.setitem(tables.TABLES, "rows", f"{__name__}:table_of_rows")
    RESULT.write(tmp_path / "bench_x.json")
    path = tmp_path / "doc.md"
    path.write_text("Times:\n<!-- table:rows -->\n<!-- /table:rows -->\n")
    return path


def test_a_registered_table_is_made_from_its_file(document: Path) -> None:
    assert make_table("rows", document.parent) == "| ms |\n| --: |\n| 1.5 |\n| 2.5 |"
    with pytest.raises(DataError, match="no table 'row'; known tables: .*bench_prune.*rows"):
        make_table("row", document.parent)


def test_a_document_is_updated_once_and_stale_again_after_a_new_run(document: Path) -> None:
    folder = document.parent
    stale = document.read_text()
    assert update(document, folder, check=True) and document.read_text() == stale
    assert update(document, folder) and "| 2.5 |" in document.read_text()
    assert not update(document, folder, check=True) and not update(document, folder)
    replace(RESULT, rows=[{"ms": 9}]).write(folder / "bench_x.json")
    assert update(document, folder, check=True)


def invoke(*words: str) -> Any:
    app = typer.Typer()
    app.command()(tables.main)
    return CliRunner().invoke(app, list(words))


def test_the_command(document: Path) -> None:
    words = (str(document), "--results", str(document.parent))
    found = invoke(*words, "--check")
    assert found.exit_code == 1 and "doc.md: tables are stale" in found.output
    found = invoke(*words)
    assert found.exit_code == 0 and "doc.md: tables updated" in found.output
    found = invoke(*words, "--check")
    assert found.exit_code == 0 and found.output == ""


def test_the_command_refuses_what_it_cannot_use(document: Path) -> None:
    folder = str(document.parent)
    assert invoke(str(document.parent / "gone.md"), "--results", folder).exit_code == 2
    (document.parent / "bench_x.json").unlink()
    found = invoke(str(document), "--results", folder)
    assert found.exit_code == 2 and "there is no result file" in found.output


@pytest.mark.parametrize("name", sorted(tables.TABLES))
def test_every_registered_table_has_its_maker(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no result file"):
        make_table(name, tmp_path)
