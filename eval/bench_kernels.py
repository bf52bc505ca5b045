"""How fast attention over windows and block lists is, and how near the bound of its sparsity.

    vistoken bench kernels                            # all cases, on one GPU, in some minutes
    vistoken bench kernels --quick --device cpu       # tiny grids on any machine
    vistoken bench kernels --cases disc-256,blocks --backends ours,dense

Nothing is timed before its output agrees with dense attention in fp64 on sampled tiles (see
`bench_kernels_checks`); the gradients must agree, too, and be the same bits in a second run.
`--append` adds cases to those of an earlier run on the same machine and commit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from vistoken.errors import BackendUnavailable, DataError, VistokenError
from vistoken.eval import bench_kernels_tables as tables
from vistoken.eval import results
from vistoken.eval.bench_kernels_cases import (
    CASES,
    Case,
    Inputs,
    attend,
    best_tiles,
    choose_cases,
    forward_flops,
    touched_share,
    visible,
    visible_pairs,
)
from vistoken.eval.bench_kernels_checks import check_backward, check_forward, sees_all
from vistoken.eval.bench_kernels_rivals import RIVALS
from vistoken.eval.device_timing import time_on_device
from vistoken.eval.timing import CheckFailed, peak_memory

OURS = ("ours", "backward")
BACKENDS = (*OURS, *RIVALS)
Found = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a run is asked for; budget: milliseconds that the timed calls of a column may take."""

    cases: tuple[Case, ...]
    backends: tuple[str, ...] = BACKENDS
    dtype: str = "bfloat16"
    budget: float = 400.0
    quick: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {**asdict(self), "cases": [case.name for case in self.cases]}


@dataclass
class Bench:
    """The measurements of a run on one device; equal dense shapes are measured once."""

    settings: Settings
    device: torch.device

    def __post_init__(self) -> None:
        self._dense: dict[tuple[int, ...], Found] = {}

    def row(self, case: Case) -> Found:
        """Check and time one case by everything that was asked for."""
        given = Inputs.draw(case, self.device, getattr(torch, self.settings.dtype))
        row = {
            **case.to_dict(),
            "tokens": case.tokens,
            "pairs": visible_pairs(case),
            "flops": forward_flops(case),
            "touched_share": touched_share(case),
            "tiles": [best_tiles(case).q_tile, best_tiles(case).kv_tile],
        }
        measures: dict[str, Callable[[], Found]] = {
            "ours": lambda: self._forward(case, given),
            "backward": lambda: self._backward(case, given),
            **{name: partial(self._rival, name, case, given) for name in RIVALS},
        }
        for name in self.settings.backends:
            row[name] = _or_reason(measures[name])
        return row

    @torch.no_grad()
    def _forward(self, case: Case, given: Inputs) -> Found:
        def run() -> tuple[Tensor, Tensor]:
            return attend(case, given.q, given.k, given.v)

        check = check_forward(case, given, *run())
        peak = peak_memory(run, self.device)
        size = given.q.numel() * given.q.element_size()
        extra = None if peak is None else {"extra": peak.added - size, "q": size}
        timing = self._time(run)
        kernel = longest_kernel(run, self.device)
        return {"check": check.to_dict(), "ms": timing, "memory": extra, "kernel": kernel}

    def _backward(self, case: Case, given: Inputs) -> Found:
        leaves = [x.detach().requires_grad_() for x in (given.q, given.k, given.v)]
        out, lse = attend(case, *leaves)

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, given.d_out, retain_graph=True)

        grads, again = run(), run()
        if not all(torch.equal(a, b) for a, b in zip(grads, again, strict=True)):
            raise CheckFailed("two runs of the backward differ")
        del again
        check = check_backward(case, given, out.detach(), lse.detach(), grads)
        del grads
        kernel = longest_kernel(run, self.device)
        return {"check": check.to_dict(), "ms": self._time(run), "kernel": kernel}

    @torch.no_grad()
    def _rival(self, name: str, case: Case, given: Inputs) -> Found:
        if name == "dense" and case.shape in self._dense:
            return self._dense[case.shape]
        run = RIVALS[name](case, given)
        check = check_forward(case, given, run(), seen=sees_all if name == "dense" else visible)
        found = {"check": check.to_dict(), "ms": self._time(run)}
        if name == "dense":
            self._dense[case.shape] = found
        return found

    def _time(self, run: Callable[[], Any]) -> Found:
        return asdict(time_on_device(run, self.device, budget=self.settings.budget))


def _or_reason(measure: Callable[[], Found]) -> Found:
    """What was measured, or why not, so that the other columns still get their times."""
    try:
        return measure()
    except BackendUnavailable as reason:
        return {"unavailable": str(reason)}
    except VistokenError as failure:
        return {"failed": str(failure)}
    except _device_errors() as failure:
        first_line = (str(failure).splitlines() or [""])[0]
        return {"failed": f"{type(failure).__name__}: {first_line}"}


def _device_errors() -> tuple[type[Exception], ...]:
    """What torch and Triton raise for want of memory and for kernels that cannot be compiled."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def longest_kernel(run: Callable[[], Any], device: torch.device) -> str | None:
    """Return the name of the kernel that takes most of the device's time.

    None on the CPU, and where the driver does not let the profiler look.
    """
    if device.type != "cuda":
        return None
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize(device)
    except RuntimeError:
        return None
    found = [(event.self_device_time_total, event.key) for event in profile.key_averages()]
    time, name = max(found, default=(0, ""))
    return name if time else None


def run(
    settings: Settings,
    device: torch.device,
    say: Callable[[str], None] = print,
    *,
    earlier: results.ResultFile | None = None,
    path: Path | None = None,
) -> results.ResultFile:
    """Check and measure all cases; the result file is written after each, where there is a path.

    earlier: a result whose other cases stay.
    """
    machine = results.machine(device)
    say(results.machine_line(machine))
    rows = {row["name"]: dict(row) for row in earlier.rows} if earlier else {}
    bench = Bench(settings, device)
    result = results.ResultFile(tables.NAME, machine, settings.to_dict(), [], {})
    for case in settings.cases:
        fresh = bench.row(case)
        rows[case.name] = {**rows.get(case.name, {}), **fresh}
        say(tables.progress_line(fresh))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        result = _with_rows(result, rows)
        if path is not None:
            result.write(path)
    return result


def _with_rows(result: results.ResultFile, rows: Mapping[str, Found]) -> results.ResultFile:
    """The result with these rows, in the order of the cases, and what follows from them."""
    ordered = [rows[case.name] for case in CASES if case.name in rows]
    measured = [name for name in BACKENDS if any(name in row for row in ordered)]
    settings = {
        **result.settings,
        "cases": [row["name"] for row in ordered],
        "backends": measured,
    }
    result = replace(result, rows=ordered, settings=settings)
    goals = [asdict(goal) for goal in tables.goals(result)]
    return replace(result, checks={"failed": tables.failures(result), "goals": goals})


def read_earlier(path: Path, device: torch.device) -> results.ResultFile | None:
    """Return the result file to append to, None if there is none.

    Raises `DataError` where it is of another machine, other versions or another commit.
    """
    if not path.exists():
        return None
    earlier, now = results.load(path, tables.NAME), results.machine(device)
    for fact in ("device", "versions", "commit"):
        if earlier.machine[fact] != now[fact]:
            raise DataError(
                f"{path} has another {fact}, {earlier.machine[fact]}, than now, {now[fact]}: "
                "measure all cases again"
            )
    return earlier


def main(
    cases: Annotated[str | None, typer.Option(help="cases, with commas between; all")] = None,
    backends: Annotated[
        str | None, typer.Option(help=f"what to measure, of {', '.join(BACKENDS)}; all")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="tiny grids, on any device")] = False,
    device: Annotated[str, typer.Option(help="torch device")] = "cuda",
    output: Annotated[
        Path | None, typer.Option(help="default, if all is measured: in eval/results")
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="keep the other cases of the output file")
    ] = False,
) -> None:
    """Time attention over windows and block lists against dense, FlexAttention and NATTEN."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    try:
        settings = read_settings(cases, backends, quick=quick)
        where = _device(device)
        if where.type == "cpu":
            settings = replace(settings, dtype="float32")
        if output is None and not quick and (append or cases is None and backends is None):
            output = results.default_path(tables.NAME)
        if append and output is None:
            raise DataError("--append needs --output, or a run that is not --quick")
        earlier = read_earlier(output, where) if append and output is not None else None
        result = run(
            settings, where, lambda line: _say(console, line), earlier=earlier, path=output
        )
    except VistokenError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    for grid in (tables.goals_grid(result), tables.time_grid(result)):
        if grid.rows:
            console.print(grid.to_rich())
    if output is not None:
        _say(console, f"written to {output}")
    for failure in (failed := tables.failures(result)):
        typer.echo(f"FAILED {failure}", err=True)
    if failed:
        raise typer.Exit(1)


def read_settings(cases: str | None, backends: str | None, *, quick: bool = False) -> Settings:
    """Return the settings that the options of the command mean; raises `DataError`."""
    chosen = choose_cases(cases)
    if quick:
        chosen = tuple(case.small() for case in chosen)
    asked = [name.strip() for name in backends.split(",")] if backends else list(BACKENDS)
    for name in asked:
        if name not in BACKENDS:
            raise DataError(f"there is no backend {name!r}; choose of {', '.join(BACKENDS)}")
    named = tuple(name for name in BACKENDS if name in asked)
    return Settings(chosen, named, budget=20.0 if quick else 400.0, quick=quick)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DataError(f"{name!r} is no torch device; use cuda, cuda:1 or cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(
            "there is no CUDA device here; --quick --device cpu measures tiny grids"
        )
    return device


if __name__ == "__main__":
    typer.run(main)
