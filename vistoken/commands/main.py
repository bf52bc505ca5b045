"""The entry point of the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from vistoken import __version__
from vistoken.commands.demo import demo
from vistoken.commands.listing import inspect, methods
from vistoken.commands.prune import prune
from vistoken.eval import run, scene_export

app = typer.Typer(
    name="vistoken",
    help="Visual-token methods: attach to a model in one line, undo exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, prune, methods, inspect):
    app.command()(command)
app.command(name="eval")(run.command)
app.add_typer(scene_export.app, name="scenes")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vistoken {__version__}")
        raise typer.Exit()


@app.callback()
def _global(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app()
