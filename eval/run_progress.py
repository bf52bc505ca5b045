"""The progress of a long run: a bar on a terminal, a line for every tenth elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as Remaining


class RunProgress:
    """Counts answers; `start` says how many there will be."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), Remaining())
            self.bar = Progress(*columns, console=console, transient=True)
        self.done = self.total = self.told = 0

    def start(self, done: int, total: int) -> None:
        """Begin with `done` of `total` answers known."""
        self.done, self.total = done, total
        self.told = 10 * done // max(1, total)
        if done:
            self.console.print(f"{done} of {total} answers are known already", style="dim")
        if self.bar is not None:
            self.bar.add_task("answers", total=total, completed=done)
            self.bar.start()

    def advance(self, count: int) -> None:
        """Count new answers."""
        self.done += count
        tenths = 10 * self.done // max(1, self.total)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done)
        elif tenths > self.told:
            self.told = tenths
            self.console.print(f"{self.done} of {self.total} answers", style="dim")

    def stop(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()


@contextmanager
def show_progress(*, quiet: bool = False) -> Iterator[RunProgress]:
    """Show the progress of a run on stderr, or nothing."""
    progress = RunProgress(Console(stderr=True, highlight=False, quiet=quiet))
    try:
        yield progress
    finally:
        progress.stop()
