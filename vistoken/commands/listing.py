"""`vistoken methods` and `vistoken inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

import vistoken
from vistoken.commands.loading import complete_prompt, inspect_model, load_model, quiet
from vistoken.commands.output import AsJson, Debug, busy, console, fails_clearly, print_json
from vistoken.errors import MethodError
from vistoken.picture import open_picture

PROMPT = "describe the image."


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
    text_dominance: Annotated[
        bool, typer.Option("--text-dominance", help="Measure attention to text against pictures.")
    ] = False,
    image: Annotated[
        Path | None, typer.Option(help="Image file for that; else a generated scene.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help=f"Prompt for that; else {PROMPT!r}")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Generated tokens whose attention is read.", min=1)
    ] = 16,
    device: Annotated[str, typer.Option(help="For that: auto, cpu, cuda or cuda:1.")] = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what vistoken sees in a model, which methods fit it, and what pruning would save.

    With --text-dominance: how much more it attends to text than to the picture, layer by layer.
    """
    if text_dominance:
        _dominance(model, image, prompt or PROMPT, max_new_tokens, device, as_json)
        return
    if image is not None or prompt is not None:
        raise MethodError("--image and --prompt are for --text-dominance; add it, or leave them.")
    with busy("reading the model"):
        found = inspect_model(model)
    if as_json:
        print_json(found.to_dict())
    else:
        console().print(Text(str(found)))


def _dominance(
    model: str, image: Path | None, prompt: str, limit: int, device: str, as_json: bool
) -> None:
    from vistoken.eval.scenes import draw, make_scene

    picture = draw(make_scene(0)) if image is None else open_picture(image)
    with busy("reading the model"):
        loaded, processor = load_model(model, device)
    text = complete_prompt(processor, prompt)
    inputs = processor(images=picture, text=text, return_tensors="pt").to(loaded.device)
    with quiet(), busy("answering"):
        found = vistoken.inspect_dominance(loaded, inputs, new_tokens=limit)
    if as_json:
        about = {"prompt": text, "image": None if image is None else str(image)}
        print_json({**about, **found.to_dict()})
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("LLM layers")
    for heading in ("MDI", "AEI"):
        table.add_column(heading, justify="right")
    for number, row in enumerate(found.table(), 1):
        table.add_row(*row, end_section=number == len(found.thirds))
    console().print(Text(found.summary()), table, Text(found.note, style="dim"))
