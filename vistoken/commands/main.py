"""The entry point of the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from vistoken import __version__
from vistoken.commands import kernels
from vistoken.commands.demo import demo
from vistoken.commands.listing import inspect, methods
from vistoken.commands.prune import prune
from vistoken.eval import bench_kernels, run, scene_export

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
app.add_typer(kernels.app)
bench = typer.Typer(name="bench", help="Measure on this machine.", no_args_is_help=True)
bench.command(name="kernels")(bench_kernels.main)
app.add_typer(bench)


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
