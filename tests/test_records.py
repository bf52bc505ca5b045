"""Reading and writing of evaluation files: round trips, and refusals with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistoken.errors import DataError
from vistoken.eval import records

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def save(folder: Path, text: str | bytes, name: str = "items.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@given(rows=st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), min_size=1, max_size=5))
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("records") / f"rows.{suffix}"
    records.write(path, rows)
    assert [record.value for record in records.read(path)] == rows
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_places_are_lines_of_jsonl_and_of_arrays(tmp_path: Path) -> None:
    lines = save(tmp_path, '{"a": 1}\n\n{"a": 2}\n')
    assert [record.place for record in records.read(lines)] == [f"{lines}:1", f"{lines}:3"]
    array = save(tmp_path, '\n[\n {"a": 1},\n\n {"a": 2}, {"a": 3}\n]\n', "items.json")
    assert [record.place for record in records.read(array)] == [
        f"{array}:3",
        f"{array}:5",
        f"{array}:5",
    ]


def test_byte_order_mark_and_unicode_line_separator_are_text(tmp_path: Path) -> None:
    path = save(tmp_path, b"\xef\xbb\xbf" + '{"a": "x\u2028y"}\n'.encode())
    assert records.read(path)[0].value == {"a": "x\u2028y"}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('{"a": 1}\n{"a": \n', 2, "not JSON"),
        ('{"a": 1}\n[1, 2]\n', 2, "must be a JSON object"),
        ('{"a": 1}\n7\n', 2, "must be a JSON object"),
        ('{"a": 1}\n\n{"a": 1, "a": 2}\n', 3, "repeats the key 'a'"),
        ('{"a": NaN}\n', 1, "NaN is not a JSON number"),
        ('{"a": 1} {"a": 2}\n', 1, "not JSON"),
        (b'{"a": 1}\n{"a": "\xff"}\n', 2, "not UTF-8"),
        ('[\n {"a": 1},\n {"a" 2}\n]', 3, "not JSON"),
        ('[\n {"a": 1},\n 5\n]', 3, "must be a JSON object"),
    ],
)
def test_malformed_files_are_refused_with_line(
    tmp_path: Path, text: str | bytes, line: int, reason: str
) -> None:
    path = save(tmp_path, text)
    with pytest.raises(DataError, match=reason) as caught:
        records.read(path)
    assert str(caught.value).startswith(f"{path}:{line}:")


@pytest.mark.parametrize("text", ["", "\n \n", "[]"])
def test_empty_files_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="holds no record"):
        records.read(save(tmp_path, text))


def test_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent.jsonl: the file cannot be read"):
        records.read(tmp_path / "absent.jsonl")


def test_duplicate_ids_name_both_places(tmp_path: Path) -> None:
    path = save(tmp_path, '{"question_id": 1}\n{"question_id": 2}\n{"question_id": 1}\n')
    with pytest.raises(DataError) as caught:
        records.index(records.read(path), "question_id")
    assert f"{path}:3" in str(caught.value) and f"{path}:1" in str(caught.value)


def test_pair_joins_in_the_order_of_the_items(tmp_path: Path) -> None:
    items = records.read(save(tmp_path, '{"question_id": 2}\n{"question_id": 1}\n'))
    answers = records.read(
        save(tmp_path, '{"question_id": 1, "t": "x"}\n{"question_id": 2, "t": "y"}\n', "a.jsonl")
    )
    assert [answer.text("t") for _, answer in records.pair(items, answers)] == ["y", "x"]


def test_missing_partners_are_named_with_their_place(tmp_path: Path) -> None:
    items = records.read(save(tmp_path, '{"question_id": 1}\n{"question_id": 2}\n'))
    answers = records.read(save(tmp_path, '{"question_id": 1}\n{"question_id": 3}\n', "a.jsonl"))
    with pytest.raises(DataError, match=r"item without an answer: question_id 2 \(.*items.jsonl:2"):
        records.pair(items, answers)
    with pytest.raises(DataError, match=r"answer without an item: question_id 3 \(.*a.jsonl:2"):
        records.pair(items[:1], answers)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda r: r.field("absent"), "'absent' is missing .* has label, id, flag"),
        (lambda r: r.text("id"), "'id' must be text, got 3"),
        (lambda r: r.identity("flag"), "'flag' must be a whole number or text, got True"),
        (lambda r: r.choice("label", ("yes", "no")), "'label' is 'perhaps'; allowed: no, yes"),
    ],
)
def test_fields_are_checked_with_place(call: Any, reason: str) -> None:
    record = records.Record({"label": "perhaps", "id": 3, "flag": True}, "items.jsonl:9")
    with pytest.raises(DataError, match=f"items.jsonl:9: the field {reason}"):
        call(record)


def test_columns_must_agree() -> None:
    assert records.check_columns(answers=["a", "b"], ids=None, labels=["c", "d"]) == 2
    with pytest.raises(DataError, match="answers 2, labels 1"):
        records.check_columns(answers=["a", "b"], labels=["c"])
    with pytest.raises(DataError, match="no items to score"):
        records.check_columns(answers=[])
    with pytest.raises(DataError, match="one entry per item, got 'yes'"):
        records.check_columns(answers="yes", labels="yes")


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    records.write(path, [{"a": 1}])
    with pytest.raises(ValueError, match="JSON compliant"):
        records.write(path, [{"a": 2}, {"a": float("nan")}])
    assert json.loads(path.read_text()) == {"a": 1}
