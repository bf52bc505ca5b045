"""Answers of an evaluation on disk: what is read back, repaired and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vistoken.errors import DataError
from vistoken.eval.run_store import Header, Store, Unit


def header(**changes: Any) -> Header:
    fields = {"configuration": "a(b=1)", "recipe": [], "model": "m", "items": "i"}
    return Header(**{**fields, "dtype": "float32", "unit": 2, **changes})


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"unit": 9, "seconds": 1, "answers": ["x"]}', "there is no unit 9"),
        ('{"unit": 1, "seconds": 1, "answers": ["x", "y"]}', "unit 1 needs 1 answers"),
        ('{"unit": 1, "seconds": 1, "answers": [3]}', "unit 1 needs 1 answers"),
        ('{"unit": 0, "seconds": 1, "answers": ["other"]}', "answered before, differently"),
        ("nonsense", "not JSON"),
    ],
)
def test_bad_lines_of_answers_are_refused(tmp_path: Path, line: str, why: str) -> None:
    Store(header(), [1, 1], tmp_path).add(0, Unit(("x",), 0.5))
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=rf"\.jsonl:3: .*{why}"):
        Store(header(), [1, 1], tmp_path).read()


def test_a_file_without_a_whole_line_is_begun_anew(tmp_path: Path) -> None:
    store = Store(header(), [1], tmp_path)
    store.add(0, Unit(("x",), 0.5))
    (path,) = tmp_path.iterdir()
    path.write_text('{"form')
    again = Store(header(), [1], tmp_path)
    again.read()
    assert again.missing == [0]
    again.add(0, Unit(("ÿ\u2028y",), 0.5))
    last = Store(header(), [1], tmp_path)
    last.read()
    assert last.units[0].answers == ("ÿ\u2028y",)


def test_recipes_have_files_of_their_own() -> None:
    one, two = (header(recipe=[{"name": "a", "x": x}]) for x in (1, 2))
    assert one.file_stem != two.file_stem and one.key != two.key
