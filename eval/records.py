"""Evaluation items and answers as JSON or JSONL files; refusals name the file and the line."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vistoken.errors import DataError

Id = int | str
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object and the place it was read from, such as `answers.jsonl:12`."""

    value: Mapping[str, Any]
    place: str

    def field(self, name: str) -> Any:
        """Return the field `name`; raises DataError if the record lacks it."""
        if name not in self.value:
            has = ", ".join(self.value) or "no field"
            raise DataError(f"{self.place}: the field {name!r} is missing (the record has {has})")
        return self.value[name]

    def text(self, name: str) -> str:
        """Return the field `name`, which must be text; raises DataError."""
        value = self.field(name)
        if not isinstance(value, str):
            raise DataError(f"{self.place}: the field {name!r} must be text, got {value!r}")
        return value

    def identity(self, name: str) -> Id:
        """Return the field `name`, which must be a whole number or text; raises DataError."""
        value = self.field(name)
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise DataError(
                f"{self.place}: the field {name!r} must be a whole number or text, got {value!r}"
            )
        return value

    def choice(self, name: str, allowed: Collection[str]) -> str:
        """Return the field `name` lower-cased and stripped, one of `allowed`; raises DataError."""
        value = self.text(name).strip().lower()
        if value not in allowed:
            raise DataError(
                f"{self.place}: the field {name!r} is {self.value[name]!r}; "
                f"allowed: {', '.join(sorted(allowed))}"
            )
        return value


def read(path: str | os.PathLike[str]) -> list[Record]:
    """Read the objects of a JSONL file or of a JSON array, told apart by the first character.

    Blank lines of a JSONL file are skipped. Raises DataError with file and line if the file is
    empty or not UTF-8, if a line is not JSON or not an object, if an object repeats a key, and
    for NaN and Infinity, which JSON does not have.
    """
    name, text = os.fspath(path), read_text(path)
    array = text.lstrip().startswith("[")
    found = list(_array(name, text) if array else _lines(name, text))
    if not found:
        raise DataError(f"{name}: the file holds no record")
    return found


def load(path: str | os.PathLike[str]) -> Any:
    """Read a file that is one JSON document; raises DataError like `read`."""
    return _parse(os.fspath(path), 1, read_text(path))


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a UTF-8 file without byte order mark; raises DataError."""
    name = os.fspath(path)
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{name}: the file cannot be read ({error.strerror})") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: the file is not UTF-8 text") from error


def record_of(value: Any, place: str) -> Record:
    """Return `value` as a record read from `place`; raises DataError unless it is an object."""
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: each record must be a JSON object, got {value!r:.60}")
    return Record(value, place)


def write(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `rows` as JSONL, or as a JSON array if the name ends in `.json`.

    The file appears whole or not at all: it is written beside its place and then moved there.
    """
    target = Path(path)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    if target.suffix == ".json":
        text = "[\n" + ",\n".join(lines) + "\n]\n"
    else:
        text = "".join(f"{line}\n" for line in lines)
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, target)


def index(records: Iterable[Record], key: str) -> dict[Id, Record]:
    """Return the records by their field `key`; raises DataError naming both places if twice."""
    found: dict[Id, Record] = {}
    for record in records:
        identity = record.identity(key)
        if identity in found:
            raise DataError(
                f"{record.place}: {key} {identity!r} occurs twice, first at {found[identity].place}"
            )
        found[identity] = record
    return found


def pair(
    items: Iterable[Record], answers: Iterable[Record], key: str = "question_id"
) -> list[tuple[Record, Record]]:
    """Join items and answers on `key`, in the order of the items.

    Raises DataError if either side repeats a key or lacks the partner of a record.
    """
    asked, given = index(items, key), index(answers, key)
    _refuse_alone("item without an answer", key, asked, given)
    _refuse_alone("answer without an item", key, given, asked)
    return [(record, given[identity]) for identity, record in asked.items()]


def check_columns(**columns: Sequence[Any] | None) -> int:
    """Return the common length of the named sequences, `None` ones apart.

    Raises DataError if a column is a bare string, if the lengths differ or if they are 0.
    """
    given = {name: column for name, column in columns.items() if column is not None}
    for name, column in given.items():
        if isinstance(column, str):
            raise DataError(f"{name} must be a sequence with one entry per item, got {column!r}")
    lengths = {name: len(column) for name, column in given.items()}
    if len(set(lengths.values())) != 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"the columns differ in length: {told}; give one entry per item in each")
    length = next(iter(lengths.values()))
    if length == 0:
        raise DataError("there are no items to score")
    return length


def check_texts(name: str, values: Iterable[Any]) -> None:
    """Raise DataError unless every entry of the column `name` is text."""
    for position, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(f"{name}[{position}] must be text, got {value!r}")


def check_choices(name: str, values: Iterable[Any], allowed: Collection[str]) -> list[str]:
    """Return the entries of column `name` lower-cased and stripped; raises DataError if unknown."""
    found = []
    for position, value in enumerate(values):
        plain = value.strip().lower() if isinstance(value, str) else value
        if plain not in allowed:
            raise DataError(f"{name}[{position}] is {value!r}; allowed: {', '.join(allowed)}")
        found.append(plain)
    return found


def check_ids(name: str, ids: Sequence[Any] | None, count: int) -> Sequence[Any]:
    """Return `ids`, or the positions if they are None; raises DataError on a duplicate."""
    if ids is None:
        return range(count)
    first: dict[Any, int] = {}
    for position, identity in enumerate(ids):
        if identity in first:
            raise DataError(
                f"{name}[{position}] repeats {identity!r} of {name}[{first[identity]}]; "
                "each may occur once"
            )
        first[identity] = position
    return ids


def _lines(name: str, text: str) -> Iterator[Record]:
    # Only "\n" ends a line: JSON text may hold the other Unicode line separators unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield record_of(_parse(name, number, line), f"{name}:{number}")


def _array(name: str, text: str) -> Iterator[Record]:
    _parse(name, 1, text)
    position = text.index("[") + 1
    line, counted = 1, 0
    while True:
        while text[position] in " \t\r\n,":
            position += 1
        if text[position] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        value, position = _DECODER.raw_decode(text, position)
        yield record_of(value, f"{name}:{line}")


def _parse(name: str, line: int, text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"{name}:{line + error.lineno - 1}"
        raise DataError(f"{place}: not JSON: {error.msg} (column {error.colno})") from error
    except _Refused as error:
        raise DataError(f"{name}:{line}: {error}") from error


class _Refused(ValueError):
    """JSON text that the standard decoder accepts and this module does not."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        raise _Refused(f"an object repeats the key {', '.join(map(repr, repeated))}")
    return found


def _refuse_constant(constant: str) -> NoReturn:
    raise _Refused(f"{constant} is not a JSON number")


def _refuse_alone(
    what: str, key: str, here: Mapping[Id, Record], there: Mapping[Id, Record]
) -> None:
    alone = [f"{key} {i!r} ({record.place})" for i, record in here.items() if i not in there]
    if alone:
        more = f" and {len(alone) - _SHOWN} more" if len(alone) > _SHOWN else ""
        raise DataError(f"{what}: {', '.join(alone[:_SHOWN])}{more}")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
