"""What pruning visual tokens costs and saves: `python -m vistoken.eval.bench_prune`.

LLaVA-1.5-7B shapes (or, with `--model llava-next-7b`, those of LLaVA-NeXT) with random weights on
one GPU, in bf16. Every prefill is one call of the model
to its first token, cut into laps by CUDA events at the borders between its parts; the laps add up
to the whole, so nothing that pruning adds can hide between them:

    prompt  before the vision tower: where the images lie in the prompt (the one time that the host
            waits for the device); of the dense model, the embedding of the prompt
    tower   vision tower and projector
    select  from the projector to the LLM: signals, selection, gather, shortening of embeddings,
            mask and positions; of the dense model, putting the features into the prompt
    llm     LLM prefill and the output head at the last position

"added" is prompt + select: all that a method does which prunes after the projector. One that acts
inside the tower also changes that lap, and one that acts inside the LLM works in that lap. From the
tower's begin to the LLM's the host must not wait for the device, which is checked twice over (see
`timing.check_synchronization`).

Before a configuration is timed, its kept counts, prefill logits and a decode step must agree with a
route built by hand (see `bench_checks`) or, where there is none, with the row alone (`bench_rows`),
in fp32 on a small model exactly; a failed one gets no time. The KV cache of every layer must have
the length that the report says. After the run the model must give the logits that it gave before,
bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from vistoken.errors import BackendUnavailable, DataError, VistokenError
from vistoken.eval import bench_prune_tables as tables
from vistoken.eval import results
from vistoken.eval.bench_checks import count_flops
from vistoken.eval.bench_models import Inputs, borders, build_model, find_size, make_inputs
from vistoken.eval.bench_rows import (
    cache_fault,
    check_variant,
    compare_with_masked_keys,
    places,
    prompt_lengths,
)
from vistoken.eval.bench_variants import Settings, Variant, preset
from vistoken.eval.timing import (
    LapClock,
    Timing,
    check_synchronization,
    measure,
    measure_laps,
    peak_memory,
    quiet_heap,
)

LAPS = {"prompt": "start", "tower": "tower", "select": "select", "llm": "llm"}
REPORTED = (
    *("flops", "flops_dense", "kv_bytes", "kv_bytes_dense"),
    *("layer_tokens", "mean_tokens"),
)


@dataclass
class Bench:
    """One model on one device, and what is asked of it."""

    model: Any
    device: torch.device
    settings: Settings
    say: Callable[[str], None]
    undo_bit_equal: bool = field(default=False, init=False)

    @torch.no_grad()
    def run(self) -> list[dict[str, Any]]:
        """Measure everything; afterwards `undo_bit_equal` says whether the model is as before."""
        rows = []
        before = {batch: self._dense_logits(batch) for batch in self.settings.batches}
        for batch in self.settings.batches:
            inputs = self._inputs(batch)
            rows.append(self._row(inputs, None, self.settings.visual_tokens, whole=True))
            for keep in self.settings.keeps:
                for variant in self.settings.variants_at(keep):
                    whole = variant is self.settings.variants[0]
                    rows.append(self._row(inputs, variant, keep, whole=whole))
            # the same thing once more: how far apart two equal measurements lie
            again = self._row(inputs, None, self.settings.visual_tokens, whole=False)
            rows.append(again | {"label": tables.AGAIN})
        self.undo_bit_equal = all(
            torch.equal(self._dense_logits(batch), logits) for batch, logits in before.items()
        )
        return rows

    def _inputs(self, batch: int) -> list[Inputs]:
        s = self.settings
        return [
            make_inputs(self.model, batch, before=s.before, after=s.after, seed=seed)
            for seed in range(s.rotation)
        ]

    def _dense_logits(self, batch: int) -> Tensor:
        return self.model(**self._inputs(batch)[0], logits_to_keep=1).logits.cpu()

    def _row(
        self, inputs: list[Inputs], variant: Variant | None, keep: int, *, whole: bool
    ) -> dict[str, Any]:
        """Check and measure one configuration; a failed check leaves its reason and no time."""
        label = variant.label if variant else "dense"
        batch = len(inputs[0]["pixel_values"])
        row: dict[str, Any] = {
            "label": label,
            "method": variant.method if variant else None,
            "batch": batch,
            "visual_tokens": keep,
        }
        try:
            if variant is not None:
                several = inputs if batch > 1 else self._inputs(2)
                row["check"] = check_variant(
                    self.model, inputs[0], variant, keep, several[0]
                ).to_dict()
            with variant.attach(self.model, keep) if variant else nullcontext() as attachment:
                row["places"] = places(attachment) if attachment else []
                row |= self._measure(inputs, attachment, whole)
        except (VistokenError, RuntimeError) as failure:  # torch raises the latter
            row["failed"] = _reason(failure)
        self.say(tables.progress_line(row))
        return row

    def _measure(self, inputs: list[Inputs], attachment: Any, whole: bool) -> dict[str, Any]:
        s, device = self.settings, self.device

        def check(given: Inputs, out: Any) -> str | None:
            rows, length = given["input_ids"].shape
            lengths = [length] * self.model.config.text_config.num_hidden_layers
            if attachment is not None:
                lengths = prompt_lengths(attachment.report(), rows, s.before + s.after)
            if fault := cache_fault(out.past_key_values, lengths):
                return fault
            return None if bool(out.logits.isfinite().all()) else "logits are not finite"

        laps = measure_laps(
            self._prefill, inputs, device=device, check=check, warmup=s.warmup, repeats=s.repeats
        )
        found: dict[str, Any] = {
            "ms": {name: asdict(laps.timing(lap)) for name, lap in LAPS.items()}
            | {
                "added": asdict(laps.timing(LAPS["prompt"], LAPS["select"])),
                "first_token": asdict(laps.timing()),
            }
        }
        peak = peak_memory(lambda: self.model(**inputs[0], logits_to_keep=1), device)
        found["memory"] = asdict(peak) | {"added": peak.added} if peak else None
        if attachment is not None:
            found["sync"] = self._synchronizations(inputs[0])
            report = attachment.report().to_dict()
            found["report"] = {name: report[name] for name in REPORTED}
        if whole:
            found["flops_counted"] = count_flops(self.model, inputs[0])
            found["ms"]["decode"] = asdict(self._decode(inputs[0]))
            found["ms"]["generate"] = asdict(self._generate(inputs))
        return found

    def _prefill(self, given: Inputs, clock: LapClock) -> Any:
        with borders(self.model, clock.begin):
            return self.model(**given, logits_to_keep=1)

    def _synchronizations(self, given: Inputs) -> dict[str, Any] | None:
        """Whether the host waits between the tower's begin and the LLM's."""

        def run(watch: Any) -> None:
            crossed = {"tower": watch.start, "llm": watch.stop}
            with borders(self.model, lambda name: crossed.get(name, lambda: None)()):
                self.model(**given, logits_to_keep=1)

        found = check_synchronization(run, self.device)
        return None if found is None else asdict(found)

    def _decode(self, given: Inputs) -> Timing:
        """Milliseconds of one decode step after the prefill, as they follow one another."""
        out = self.model(**given, logits_to_keep=1)
        warmup = self.settings.warmup
        clock = LapClock(self.device)
        for step in range(warmup + self.settings.decode_steps):
            clock.begin(str(step))
            token = out.logits[:, -1:].argmax(-1)
            out = self.model(input_ids=token, past_key_values=out.past_key_values)
        times = list(clock.stop().values())
        return Timing.of(times[warmup:])

    def _generate(self, inputs: list[Inputs]) -> Timing:
        new = self.settings.new_tokens

        def check(given: Inputs, sequences: Tensor) -> str | None:
            ids = given["input_ids"]
            if sequences.shape != (ids.shape[0], ids.shape[1] + new):
                return f"generate returned {list(sequences.shape)} for {list(ids.shape)} + {new}"
            kept = torch.equal(sequences[:, : ids.shape[1]], ids)
            return None if kept else "generate does not return the caller's prompt"

        return measure(
            lambda given: self.model.generate(**given, max_new_tokens=new, do_sample=False),
            inputs,
            device=self.device,
            check=check,
            warmup=0,
            repeats=self.settings.generate_repeats,
        )


def _reason(failure: Exception) -> str:
    """Why a configuration has no time, so that the others still get theirs."""
    named = isinstance(failure, VistokenError)
    return str(failure) if named else f"{type(failure).__name__}: {failure}"


@torch.no_grad()
def check_exactness(device: torch.device, settings: Settings) -> dict[str, Any]:
    """Check every variant on the small fp32 model, where it must be exact."""
    small = preset(settings.model, smoke=True)
    model, eager = (
        build_model(small.model, device=device, dtype=torch.float32, attention=attention)
        for attention in ("sdpa", "eager")
    )
    inputs = make_inputs(model, 2, before=small.before, after=small.after)
    compared, failed = 0, {}
    for variant in settings.variants:
        for keep in small.keeps:
            try:
                check_variant(model, inputs, variant, keep, inputs)
                compared += 1
                compared += (
                    compare_with_masked_keys(model, eager, inputs, variant, keep) is not None
                )
            except (VistokenError, RuntimeError) as failure:
                failed[f"{variant.label} at {keep}"] = _reason(failure)
    return {"compared": compared, "failed": failed}


def run(
    settings: Settings, device: torch.device, say: Callable[[str], None] = print
) -> results.ResultFile:
    """Check and measure everything that `settings` asks for on `device`."""
    machine = results.machine(device)
    say(results.machine_line(machine))
    exact = check_exactness(device, settings)
    say(f"fp32, small model: {exact['compared']} comparisons, {len(exact['failed'])} failed")
    clock = LapClock(device)
    clock.begin("build")
    dtype = getattr(torch, settings.dtype)
    model = build_model(settings.model, device=device, dtype=dtype)
    seconds = clock.stop()["build"] / 1000
    say(f"{find_size(settings.model).title} with random weights: built in {seconds:.1f} s")
    bench = Bench(model, device, settings, say)
    with quiet_heap():
        rows = bench.run()
    checks = {
        "fp32_exact": exact,
        "undo_bit_equal": bench.undo_bit_equal,
        "flops": tables.flops_rows(rows),
    }
    result = results.ResultFile(tables.NAME, machine, settings.to_dict(), rows, checks)
    goals = [asdict(goal) for goal in tables.goals(result)]
    return replace(result, checks={**checks, "goals": goals})


def show(result: results.ResultFile, console: Console) -> None:
    """Print the tables; the compact one comes last."""
    for grid in (
        tables.time_grid(result),
        tables.method_grid(result),
        tables.flops_grid(result),
        tables.goals_grid(result),
        tables.time_grid(result, tables.shown_first(result)),
    ):
        if grid.rows:
            console.print(grid.to_rich())


def main(
    model: Annotated[str, typer.Option(help="llava-1.5-7b or llava-next-7b")] = Settings.model,
    batch: Annotated[str | None, typer.Option(help="batch sizes, as 1,8")] = None,
    keep: Annotated[str | None, typer.Option(help="visual tokens kept, as 192,64")] = None,
    methods: Annotated[str | None, typer.Option(help="methods, by default all")] = None,
    repeats: Annotated[int | None, typer.Option(help="timed calls", min=1)] = None,
    device: Annotated[str, typer.Option(help="torch device")] = "cuda",
    smoke: Annotated[bool, typer.Option("--smoke", help="a tiny model on the CPU")] = False,
    out: Annotated[
        Path | None, typer.Option(help="default: bench_prune[_next].json in eval/results")
    ] = None,
    json_path: Annotated[
        str | None,
        typer.Option("--json", metavar="PATH", help="a copy of the result, - for stdout"),
    ] = None,
) -> None:
    """Time a LLaVA with and without pruning: prefill, decode, memory, and what selection adds."""
    console = _console(stderr=json_path == "-")
    try:
        settings = preset(model, smoke=smoke).choose(methods)
        where = torch.device("cpu")
        if not smoke:
            given: dict[str, Any] = {"batches": batch and _numbers(batch), "repeats": repeats}
            settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
            settings = settings.at(_numbers(keep)) if keep else settings
            where, out = _device(device), out or results.default_path(settings.file_name)
        result = run(settings, where, lambda line: _say(console, line))
        if out is not None:
            _say(console, f"written to {result.write(out)}")
        show(result, console)
        if json_path == "-":
            print(result.to_json(), end="")
        elif json_path is not None:
            result.write(json_path)
    except VistokenError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    for failure in (failed := tables.failures(result)):
        typer.echo(f"FAILED {failure}", err=True)
    if failed:
        raise typer.Exit(1)


def _console(*, stderr: bool) -> Console:
    """A terminal as wide as it is; into a file or a pipe, wide enough for every table."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=160)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise DataError(f"expected whole numbers with commas between, got {text!r}") from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DataError(f"{name!r} is no torch device; use cuda, cuda:1 or cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(
            "there is no CUDA device here; --smoke runs a tiny model on the CPU instead"
        )
    return device


if __name__ == "__main__":
    typer.run(main)
