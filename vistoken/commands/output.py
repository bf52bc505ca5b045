"""What the commands share: where text goes, JSON, and errors in one line."""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from vistoken import VistokenError

BAD_INPUT = 2
_WIDTH = 120  # of tables where there is no terminal to ask

Command = TypeVar("Command", bound=Callable[..., Any])

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def console(*, stderr: bool = False) -> Console:
    """Return a console; without a terminal it writes plain text in lines of fixed width."""
    found = Console(stderr=stderr, highlight=False)
    if found.is_terminal:
        return found
    return Console(stderr=stderr, highlight=False, width=_WIDTH)


def print_json(content: Any) -> None:
    """Print plain values as JSON."""
    typer.echo(json.dumps(content, indent=2, allow_nan=False))


def busy(words: str) -> AbstractContextManager[Any]:
    """Show that something long is going on, where there is a terminal to show it on."""
    progress = console(stderr=True)
    return progress.status(words) if progress.is_terminal else nullcontext()


def fails_clearly(command: Command) -> Command:
    """Turn a `VistokenError` into one line on stderr and exit code 2; `--debug` adds its origin."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except VistokenError as error:
            if kwargs.get("debug"):
                traceback.print_exception(error)
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(BAD_INPUT) from error

    return run  # type: ignore[return-value]


def scaled(value: float, step: float, units: tuple[str, ...]) -> str:
    """Write a value in the largest unit that leaves at least 1 before the point."""
    for unit in units[:-1]:
        if value < step:
            return f"{value:.3g} {unit}"
        value /= step
    return f"{value:.3g} {units[-1]}"


def flops(value: float) -> str:
    """Write a number of floating-point operations."""
    return scaled(value, 1000, ("FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def memory(value: float) -> str:
    """Write a number of bytes."""
    return scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def change(before: float, after: float) -> str:
    """Write by how much a value fell or rose."""
    return f"{after / before - 1:+.1%}" if before and after != before else ""
