"""`vistoken methods` and `vistoken inspect`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

import vistoken
from vistoken.commands.loading import inspect_model
from vistoken.commands.output import AsJson, Debug, busy, console, fails_clearly, print_json
from vistoken.errors import MethodError


@fails_clearly
def methods(
    name: Annotated[
        str | None, typer.Argument(help="A family, a method, or `show` before a method.")
    ] = None,
    method: Annotated[str | None, typer.Argument(help="The method to show.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the methods of all families or of one, or show the options of one method."""
    if name == "show" and method is None:
        raise MethodError(f"Name a method to show: {', '.join(vistoken.method_names())}.")
    shown = method if name == "show" else name if name in vistoken.method_names() else None
    if shown is None:
        _list(name, as_json)
    else:
        _show(shown, as_json)


def _rows(family: str | None) -> list[vistoken.MethodInfo]:
    try:
        return vistoken.list_methods(family)
    except MethodError as no_family:
        try:
            vistoken.method_class(str(family))
        except MethodError as no_method:
            raise MethodError(f"{no_family} {no_method}") from None
        raise


def _list(family: str | None, as_json: bool) -> None:
    rows = _rows(family)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("method", "family", "kind", "models", "source"):
        table.add_column(heading)
    for row in rows:
        name = Text(row.name, style="bold")
        table.add_row(name, row.family, row.tag, ", ".join(row.hosts), row.paper)
    console().print(table)
    console().print("Options of one: vistoken methods NAME", style="dim")


def _show(name: str, as_json: bool) -> None:
    cls = vistoken.method_class(name)
    options = {key: _describe(field) for key, field in cls.options().items()}
    if as_json:
        about = {"name": cls.name, "family": cls.family, "tag": cls.tag, "paper": cls.paper}
        print_json({**about, "options": options})
        return
    out = console()
    out.print(Text(cls.name, style="bold"), f"{cls.family}, {cls.tag}", cls.paper, sep="  ")
    out.print(Text(_summary(cls)))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("option", "default", "allowed", "meaning"):
        table.add_column(heading)
    for key, row in options.items():
        default = "" if row["default"] is None else str(row["default"])
        table.add_row(Text(key, style="bold"), default, _allowed(row), Text(row["help"]))
    out.print(table)


def _summary(cls: type) -> str:
    """The first sentences of the class's docstring, up to the first empty line."""
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def _describe(field: Any) -> dict[str, Any]:
    limits = {key: value for key, value in field.metadata.items() if value is not None}
    if "choices" in limits:
        limits["choices"] = list(limits["choices"])
    return {"default": field.default, **limits}


def _allowed(row: dict[str, Any]) -> str:
    if "choices" in row:
        return ", ".join(map(str, row["choices"]))
    words = (("minimum", "≥"), ("maximum", "≤"), ("below", "<"))
    return ", ".join(f"{sign} {row[key]:g}" for key, sign in words if key in row)


@fails_clearly
def inspect(
    model: Annotated[
        str, typer.Option(help="Local checkpoint folder, or `shipped` for the model inside.")
    ] = "shipped",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what vistoken sees in a model, which methods fit it, and what pruning would save."""
    with busy("reading the model"):
        found = inspect_model(model)
    if as_json:
        print_json(found.to_dict())
    else:
        console().print(Text(str(found)))
