"""Markdown tables made from result files: `python -m vistoken.eval.tables README.md`.

A document marks where a table goes:

    <!-- table:bench_prune -->
    (replaced on every run)
    <!-- /table:bench_prune -->

`TABLES` names the function that makes each table; a new table is one line there. With `--check`
nothing is written, and the exit status is 1 if a table in the document is not the one that its
result file gives.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from vistoken.errors import DataError, VistokenError
from vistoken.eval.results import FOLDER

Maker = Callable[[Path], str]

# Name of the table -> "module:function"; the function takes the folder of result files and returns
# Markdown. It is imported when a document asks for the table.
TABLES: dict[str, str] = {
    "bench_graph": "vistoken.eval.bench_graph:readme_table",
    "bench_kernels": "vistoken.eval.bench_kernels_tables:readme_table",
    "bench_prune": "vistoken.eval.bench_prune_tables:readme_table",
    "bench_prune_methods": "vistoken.eval.bench_prune_tables:methods_table",
    "bench_prune_next": "vistoken.eval.bench_prune_tables:next_table",
    "eval": "vistoken.eval.run_report:readme_table",
    "scoreboard": "vistoken.eval.scoreboard_tables:readme_table",
}

_MARKER = re.compile(r"<!-- (?P<close>/?)table:(?P<name>[\w-]+) -->")


@dataclass(frozen=True)
class Grid:
    """A table before it is Markdown or terminal output.

    `columns` are headings; a heading that starts with "<" is aligned left, the others right.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __post_init__(self) -> None:
        uneven = [row for row in self.rows if len(row) != len(self.columns)]
        if uneven:
            raise ValueError(f"{self.title}: {uneven[0]!r} does not fit {list(self.columns)!r}")

    def to_markdown(self) -> str:
        """Return the table, and the note below it, as GitHub Markdown."""
        heads = [column.removeprefix("<") for column in self.columns]
        rules = [":--" if column.startswith("<") else "--:" for column in self.columns]
        lines = [_line(heads), _line(rules), *(_line(row) for row in self.rows)]
        return "\n".join(lines + (["", self.note] if self.note else []))

    def to_rich(self) -> Table:
        """Return the table for a terminal."""
        table = Table(title=self.title, caption=self.note or None, box=box.SIMPLE_HEAD)
        for column in self.columns:
            justify = "left" if column.startswith("<") else "right"
            table.add_column(column.removeprefix("<"), justify=justify)  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(*row)
        return table


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def make_table(name: str, results: Path = FOLDER, tables: Mapping[str, str] = TABLES) -> str:
    """Return the Markdown of a registered table, made from the files in the folder `results`."""
    if name not in tables:
        raise DataError(f"there is no table {name!r}; known tables: {', '.join(sorted(tables))}")
    module, _, function = tables[name].partition(":")
    maker: Maker = getattr(importlib.import_module(module), function)
    return maker(results)


def replace_tables(text: str, make: Callable[[str], str], *, source: str = "document") -> str:
    """Return `text` with every marked table replaced by what `make(name)` returns.

    Raises `DataError` with the line of a marker that is not closed, not opened or nested.
    """
    pieces: list[str] = []
    done = 0
    opened: re.Match[str] | None = None
    for marker in _MARKER.finditer(text):
        expected = ("", marker["name"]) if opened is None else ("/", opened["name"])
        if (marker["close"], marker["name"]) != expected:
            raise _unpaired(text, opened or marker, source)
        if opened is None:
            pieces += [text[done : marker.end()], "\n", make(marker["name"]).strip(), "\n"]
            opened = marker
        else:
            opened, done = None, marker.start()
    if opened is not None:
        raise _unpaired(text, opened, source)
    return "".join([*pieces, text[done:]])


def _unpaired(text: str, marker: re.Match[str], source: str) -> DataError:
    line = text.count("\n", 0, marker.start()) + 1
    return DataError(
        f"{source}:{line}: {marker[0]} has no partner; a table lies between "
        f"<!-- table:{marker['name']} --> and <!-- /table:{marker['name']} -->"
    )


def update(document: Path, results: Path = FOLDER, *, check: bool = False) -> bool:
    """Bring the tables of `document` up to date; returns whether any was stale.

    With `check` the document is left as it is. Raises `DataError` for a document or a result file
    that cannot be used.
    """
    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{document} cannot be read: {error}") from error
    fresh = replace_tables(text, lambda name: make_table(name, results), source=str(document))
    if fresh == text:
        return False
    if not check:
        document.write_text(fresh, encoding="utf-8")
    return True


def main(
    documents: Annotated[list[Path], typer.Argument(help="Markdown files with table markers")],
    check: Annotated[bool, typer.Option("--check", help="write nothing, fail if stale")] = False,
    results: Annotated[Path, typer.Option(help="folder of result files")] = FOLDER,
) -> None:
    """Replace the marked tables of Markdown files by those of the current result files."""
    stale = []
    for document in documents:
        try:
            if update(document, results, check=check):
                stale.append(document)
        except VistokenError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
    for document in stale:
        typer.echo(f"{document}: {'tables are stale' if check else 'tables updated'}")
    if check and stale:
        typer.echo(f"bring them up to date: python -m vistoken.eval.tables {documents[0]}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
