"""Evaluate a model, bare and with methods, on the same pictures: POPE, CHAIR and VQA.

    python -m vistoken.eval.run --task pope,chair,vqa --compare --out results
    python -m vistoken.eval.run --model DIR --data coco:PATH --method holov --keep 64,128 --compare
    accelerate launch --num_processes 8 -m vistoken.eval.run ...        one replica for each GPU

Answers are greedy. With `--out` they are kept as they come, and the same command goes on after an
interruption. Pictures are answered in units of `--batch`, whoever answers them, so any number of
processes gives the result of one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import vistoken
from vistoken.errors import DataError, VistokenError
from vistoken.eval import chair, results
from vistoken.eval.items import Data, load_data
from vistoken.eval.run_collect import collect, in_order, open_stores
from vistoken.eval.run_model import (
    Configuration,
    Reader,
    make_configurations,
)
from vistoken.eval.run_progress import show_progress
from vistoken.eval.run_report import (
    NAME,
    brief,
    describe,
    failures,
    make_row,
    summary,
    write_report,
)
from vistoken.eval.run_setup import SHIPPED, check_bare, load, prompt_writer
from vistoken.eval.run_store import Store
from vistoken.eval.run_workers import Workers, cores, find_workers, launched, leave, spawn
from vistoken.eval.tasks import (
    Plan,
    Protocol,
    choose_tasks,
    make_plan,
    score,
)

BATCH = 8
INTERRUPTED = 130
_WORTH_STARTING = 64  # pictures; for fewer, starting processes takes longer than it saves
Watch = Callable[[int], object]


def evaluate(
    model: Any,
    processor: Any,
    *,
    data: str | Data = "scenes",
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] = (),
    keeps: Sequence[int] = (),
    ratios: Sequence[float] = (),
    options: Sequence[str] = (),
    compare: bool = False,
    images: int | None = None,
    image_folder: Path | None = None,
    protocol: Protocol | None = None,
    template: str | None = None,
    batch: int = BATCH,
    out: str | Path | None = None,
    name: str = "",
    on_start: Callable[[int, int], object] = lambda done, total: None,
    watch: Watch = lambda answers: None,
) -> results.ResultFile:
    """Answer the prompts of all tasks with every configuration, score and compare them.

    Args:
        model, processor: a transformers model that vistoken supports, nothing attached.
        data, images, image_folder: see `items.load_data`; or data that was loaded before.
        tasks: of pope, chair and vqa; None takes all that the data can serve.
        methods, keeps, ratios, options, compare: see `run_model.make_configurations`.
        protocol: prompts, limits, parsers, seed; see `tasks.Protocol`.
        template: prompt with the image placeholder and `{question}`, for a processor without chat
            template.
        batch: pictures that are read at once; a part of the identity of a run.
        out: folder for answers, report and plots; answers found there are not asked for again.
        name: what the report calls the model.
        on_start, watch: get the numbers of answers (known already, in all) and (new).

    Returns the report, the same on every process of a launcher; only the first one writes.
    Raises `VistokenError` for whatever cannot be used, before anything is answered.
    """
    workers = find_workers(model.device.type)
    protocol = protocol or Protocol()
    if batch < 1:
        raise DataError(f"batch must be at least 1, got {batch}")
    check_bare(model)
    if isinstance(data, str):
        data = load_data(data, images=images, seed=protocol.seed, image_folder=image_folder)
    configurations = make_configurations(
        model,
        methods,
        keeps=keeps,
        ratios=ratios,
        options=options,
        compare=compare,
        seed=protocol.seed,
    )
    plan = make_plan(data, tasks, protocol, prompt_writer(processor, template))
    rows = plan.by_picture
    units = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    folder = None if out is None else Path(out)
    stores = open_stores(model, plan, configurations, units, batch, folder, workers)
    sizes = [sum(len(asks) for asks in unit) for unit in units]
    asked = len(configurations) * sum(sizes)
    known = sum(sizes[number] for store in stores for number in store.units)
    on_start(known, asked)
    collect(model, processor, plan, configurations, units, stores, workers, watch)
    found: results.ResultFile | None = None
    if workers.first:
        answers = [in_order(plan, units, store) for store in stores]
        settings = {
            "model": name or type(model).__name__,
            "model_fingerprint": stores[0].header.model,
            "dtype": stores[0].header.dtype,
            "processes": workers.count,
            "batch": batch,
            **describe(plan, template),
        }
        found = _report(model, processor, plan, configurations, stores, answers, settings)
        if folder is not None:
            write_report(found, plan, answers, folder)
    return workers.share(found)


def _report(
    model: Any,
    processor: Any,
    plan: Plan,
    configurations: Sequence[Configuration],
    stores: Sequence[Store],
    answers: Sequence[Sequence[str]],
    settings: dict[str, Any],
) -> results.ResultFile:
    """Score every configuration and compare it with the bare model and with the control."""
    scored = [score(plan, given) for given in answers]
    rows, equal, compared = [], 0, 0
    for i, configuration in enumerate(configurations):
        reader = Reader(model, processor, plan, plan.by_picture[:1])
        texts = reader.spot_check(configuration)
        compared += len(texts)
        equal += sum(answers[i][ask] == text for ask, text in texts.items())
        pictures = [len(unit) for unit in _chunks(plan.by_picture, settings["batch"])]
        times = [stores[i].units[n].seconds / size for n, size in enumerate(pictures)]
        row = make_row(plan, configurations, scored, i, times, reader.costs(configuration))
        rows.append(row)
    checks = {"answers_compared_with_generate": compared, "answers_equal": equal}
    return results.ResultFile(
        benchmark=NAME,
        machine=results.machine(model.device),
        settings=settings,
        rows=rows,
        checks=checks,
    )


def _chunks(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _split(texts: Sequence[str], kind: Callable[[str], Any], option: str) -> list[Any]:
    """Read an option that may be repeated and may hold commas."""
    parts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    try:
        return [kind(part) for part in parts]
    except ValueError as error:
        raise DataError(f"{option} takes numbers with commas between, got {texts!r}") from error


def command(
    model: Annotated[
        str, typer.Option(help="Local checkpoint folder, or `shipped` for the model inside.")
    ] = "shipped",
    data: Annotated[
        str, typer.Option(help="scenes, scenes:SPLIT, coco:PATH or jsonl:PATH.")
    ] = "scenes",
    task: Annotated[
        list[str] | None,
        typer.Option(help="pope, chair, vqa, with commas; all that the data serve unless given."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Methods, repeated or with commas.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Visual tokens kept, with commas; a ninth by default.")
    ] = None,
    ratio: Annotated[
        list[str] | None, typer.Option(help="Shares of them removed, with commas.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="key=value, or method.key=value; repeatable.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Add the bare model and a random control.")
    ] = False,
    images: Annotated[
        int | None, typer.Option(help="Pictures: 300 scenes, 500 of COCO, all of a JSONL file.")
    ] = None,
    image_folder: Annotated[Path | None, typer.Option(help="Where the picture files lie.")] = None,
    seed: Annotated[int, typer.Option(help="Of pictures, questions, control, intervals.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for answers, report and plots; goes on there.")
    ] = None,
    suffix: Annotated[
        str, typer.Option(help="What follows a question: none, llava, vcd or sgrs.")
    ] = Protocol.suffix,
    parser: Annotated[str, typer.Option(help="POPE parser.")] = Protocol.parser,
    vqa_mode: Annotated[str, typer.Option(help="VQA normalization.")] = Protocol.vqa_mode,
    lemmatizer: Annotated[str, typer.Option(help="CHAIR lemmatizer.")] = Protocol.lemmatizer,
    per_image: Annotated[
        int | None, typer.Option(help="POPE objects per picture: 1 for scenes, else 3.")
    ] = None,
    caption_prompt: Annotated[str, typer.Option(help="CHAIR prompt.")] = chair.PROMPT,
    answer_tokens: Annotated[
        int, typer.Option(help="Most new tokens of an answer.")
    ] = Protocol.answer_tokens,
    caption_tokens: Annotated[
        int, typer.Option(help="Most new tokens of a description.")
    ] = Protocol.caption_tokens,
    template: Annotated[
        str | None, typer.Option(help="Prompt with the image placeholder and {question}.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures that are read at once.")] = BATCH,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    processes: Annotated[
        int | None,
        typer.Option(help="On a CPU: one per core for the shipped model, else 1.", min=1),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure hallucination and accuracy of a model, bare and with methods, on one data set."""
    given = dict(locals())
    workers = Workers()
    try:
        count = _processes(processes, model, device, images)
        if count > 1 and not launched():
            raise typer.Exit(spawn(_command, {**given, "processes": 1, "device": "cpu"}, count))
        workers = find_workers(device)
        protocol = Protocol(
            suffix=suffix,
            per_image=per_image,
            parser=parser,
            vqa_mode=vqa_mode,
            lemmatizer=lemmatizer,
            caption_prompt=caption_prompt,
            answer_tokens=answer_tokens,
            caption_tokens=caption_tokens,
            seed=seed,
        )
        chosen: dict[str, Any] = {
            "methods": _split(method or [], str, "--method"),
            "keeps": _split(keep or [], int, "--keep"),
            "ratios": _split(ratio or [], float, "--ratio"),
            "tasks": _split(task, str, "--task") if task else None,
        }
        # Data that cannot be used are refused before a large model is read.
        found = load_data(data, images=images, seed=seed, image_folder=image_folder)
        choose_tasks(found, chosen["tasks"])
        loaded, processor = load(model, workers.device or device, dtype)
        with show_progress(quiet=not workers.first) as progress:
            report = evaluate(
                loaded,
                processor,
                data=found,
                **chosen,
                options=option or [],
                compare=compare,
                protocol=protocol,
                template=template.replace("\\n", "\n") if template else None,
                batch=batch,
                out=out,
                name=vistoken.list_shipped()[0] if model == SHIPPED else model,
                on_start=progress.start,
                watch=progress.advance,
            )
    except VistokenError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        told = "the same command goes on from here" if out else "with --out it could be resumed"
        typer.echo(f"interrupted: {told}", err=True)
        raise typer.Exit(INTERRUPTED) from error
    finally:
        leave(workers)
    if not workers.first:  # a launcher ends all processes when one fails: only the first may
        return
    _show(report, out, as_json)
    if failed := failures(report):
        typer.echo(f"error: no answer could be parsed: {'; '.join(failed)}", err=True)
        raise typer.Exit(1)


def _command(**given: Any) -> None:
    """Run the command in a process of its own, and leave its status as that of the process."""
    try:
        command(**given)
    except typer.Exit as end:
        sys.exit(end.exit_code)


def _processes(wanted: int | None, model: str, device: str, images: int | None) -> int:
    """Return how many processes to start; more than one on a CPU only.

    There a process for each core is faster with a small model than one process with as many
    threads: those mostly wait for each other, most of all where other programs use the cores, too.
    """
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if wanted is not None:
        if wanted > 1 and not on_cpu:
            raise DataError("--processes is for the CPU; on GPUs use accelerate launch")
        return wanted
    small = model in (SHIPPED, *vistoken.list_shipped())
    few = images is not None and images < _WORTH_STARTING
    able = small and on_cpu and not few and find_spec("accelerate") is not None
    return min(cores(), 4) if able else 1


def _show(report: results.ResultFile, out: Path | None, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(report.to_json())
        return
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    console.print(brief(report).to_rich())
    console.print(summary(report), style="dim", highlight=False)
    if out is not None:
        console.print(f"{out}: report.json, report.md, plots, items.jsonl", highlight=False)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(name="eval")(command)


if __name__ == "__main__":
    app()
