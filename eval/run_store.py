"""Answers of an evaluation on disk, so that an interrupted run goes on where it stopped.

Every configuration (the bare model, a method at a budget) has an append-only file

    OUT/answers/<configuration>.<process>.jsonl

whose first line says what was asked of which model, and whose other lines hold the answers about a
few pictures (a unit) each. A unit is written in one piece; a torn last line is cut off and its unit
is answered again. Answers of another model, other items or another recipe are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vistoken.errors import DataError
from vistoken.eval import records

FORMAT = 1


@dataclass(frozen=True)
class Unit:
    """The answers about a few pictures, in the order of the plan, and the seconds they took."""

    answers: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Header:
    """What answers belong to: they can be used for exactly this."""

    configuration: str
    recipe: Sequence[Mapping[str, Any]]
    model: str
    items: str
    dtype: str
    unit: int

    def to_dict(self) -> dict[str, Any]:
        """Return the header line, with the hash over everything in it."""
        return {"format": FORMAT, **self._content(), "key": self.key}

    @property
    def key(self) -> str:
        """SHA-256 over the header."""
        text = json.dumps([FORMAT, self._content()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def file_stem(self) -> str:
        """A readable file name that no other recipe shares."""
        words = re.sub(r"[^\w.-]+", "-", self.configuration).strip("-")
        code = hashlib.sha256(json.dumps(list(self.recipe), sort_keys=True).encode()).hexdigest()
        return f"{words[:60]}-{code[:8]}"

    def _content(self) -> dict[str, Any]:
        return {
            "configuration": self.configuration,
            "recipe": [dict(method) for method in self.recipe],
            "model": self.model,
            "items": self.items,
            "dtype": self.dtype,
            "unit": self.unit,
        }


@dataclass
class Store:
    """The answers of one configuration; without a folder they live in memory alone.

    `sizes[i]` is the number of answers in unit i.
    """

    header: Header
    sizes: Sequence[int]
    folder: Path | None = None
    units: dict[int, Unit] = field(default_factory=dict)

    def read(self) -> None:
        """Read the files of all earlier processes and cut off torn lines.

        Raises `DataError` for answers of another run, and for lines that are not what was written.
        """
        if self.folder is None or not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob(f"{self.header.file_stem}.*.jsonl")):
            repair(path)
            if path.stat().st_size:
                self._read_file(path)

    def add(self, number: int, unit: Unit, process: int = 0) -> None:
        """Take the answers of a unit, and append them to the file of this process."""
        self.units[number] = unit
        if self.folder is None:
            return
        path = self.folder / f"{self.header.file_stem}.{process}.jsonl"
        line = {"unit": number, "seconds": round(unit.seconds, 4), "answers": unit.answers}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                if file.tell() == 0:
                    file.write(_line(self.header.to_dict()))
                file.write(_line(line))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error

    @property
    def missing(self) -> list[int]:
        """The units without answers."""
        return [number for number in range(len(self.sizes)) if number not in self.units]

    def _read_file(self, path: Path) -> None:
        first, *rest = records.read(path)
        self._check_header(first)
        for record in rest:
            number, answers = record.field("unit"), record.field("answers")
            seconds = record.field("seconds")
            if not isinstance(number, int) or not 0 <= number < len(self.sizes):
                raise DataError(f"{record.place}: there is no unit {number!r} in this run")
            if (
                not isinstance(answers, list)
                or len(answers) != self.sizes[number]
                or not all(isinstance(answer, str) for answer in answers)
                or not isinstance(seconds, (int, float))
            ):
                raise DataError(f"{record.place}: unit {number} needs {self.sizes[number]} answers")
            unit = Unit(tuple(answers), float(seconds))
            if self.units.setdefault(number, unit).answers != unit.answers:
                raise DataError(f"{record.place}: unit {number} was answered before, differently")

    def _check_header(self, record: records.Record) -> None:
        wanted = self.header.to_dict()
        differs = [name for name in wanted if record.value.get(name) != wanted[name]]
        if differs:
            named = ", ".join(name for name in differs if name != "key") or "key"
            raise DataError(
                f"{record.place}: these are the answers of another run (another {named}): choose "
                "another --out, or delete the folder to begin anew"
            )


def repair(path: Path) -> None:
    """Cut off the last line of a file if it does not end in a line break."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
