"""`vistoken demo`: the shipped model answers with all visual tokens and with few."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import vistoken
from vistoken.commands.loading import load_model, quiet
from vistoken.commands.output import (
    AsJson,
    Debug,
    busy,
    change,
    console,
    fails_clearly,
    flops,
    memory,
    print_json,
)
from vistoken.errors import DataError
from vistoken.eval import results, scoreboard, scoreboard_tables
from vistoken.picture import Panel, Tile, draw_kept, draw_sheet, open_picture, save_picture

SCENES = 8
METHOD, CONTROL = vistoken.DEFAULT_PRUNING, "random"
# Photographs that other packages carry, where they are installed.
PHOTOS = (
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)


@dataclass(frozen=True)
class Case:
    """One scene and the question about it."""

    picture: Any
    question: str
    truth: str
    inputs: Any


@dataclass(frozen=True)
class Reply:
    """The answer to one case, the tokens it was given from, what it cost and how long it took."""

    text: str
    right: bool
    report: vistoken.Report
    seconds: float


@fails_clearly
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the results.")] = Path(
        "demo"
    ),
    keep: Annotated[int, typer.Option(help="Visual tokens that stay, of 576.", min=1)] = 64,
    questions: Annotated[
        int, typer.Option(help="Questions behind the table of accuracies; 0: no table.", min=0)
    ] = 300,
    seeds: Annotated[int, typer.Option(help="Seeds of the random control.", min=1)] = 1,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show pruning on the model in the package: answers, pictures, savings, accuracy."""
    began = time.perf_counter()
    folder = _make_folder(out)
    screen = Console(quiet=True) if as_json else console()
    with busy("reading the model"):
        model, processor = load_model("shipped", "cpu")
    facts = vistoken.inspect(model).facts
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    screen.print(
        f"A LLaVA of {weights:.1f} M parameters answers with all {facts.visual_tokens} visual "
        f"tokens of a picture and with {min(keep, facts.visual_tokens)}: chosen by {METHOD}, and "
        "at random as a control. It is asked about the smallest thing, or for the number of all."
    )
    cases = [_case(index, processor) for index in range(SCENES)]
    with quiet(), busy("answering"):
        replies = {
            None: _answer(model, processor, cases, None, facts.visual_tokens),
            METHOD: _answer(model, processor, cases, METHOD, keep),
            CONTROL: _answer(model, processor, cases, CONTROL, keep),
        }
    screen.print(_answers_table(cases, replies), _savings_table(replies))
    files = _draw(folder, cases, replies, facts.grid)
    files += _draw_photos(folder, model, processor, keep, facts.grid)
    result = None
    if questions:
        settings = scoreboard.Settings(questions=questions, seeds=seeds)
        result = _measure_accuracy(model, processor, settings, screen)
        files.append(result.write(folder / "scoreboard.json"))
    seconds = time.perf_counter() - began
    if as_json:
        print_json(_as_dict(cases, replies, keep, result, files, seconds))
        return
    screen.print(f"\nWritten in {seconds:.0f} s:", *(Text(f"  {path}") for path in files), sep="\n")
    example = f"--image {folder / 'scene.png'} --keep 32 --save-picture kept.png"
    words = f'\nNext: vistoken prune {example} --prompt "describe the image."'
    screen.print(Text(words), soft_wrap=True)


def _measure_accuracy(
    model: Any, processor: Any, settings: scoreboard.Settings, screen: Console
) -> results.ResultFile:
    work = scoreboard.work(settings, vistoken.inspect(model).facts.visual_tokens)
    with scoreboard.show_progress(work, console(stderr=True)) as watch:
        result = scoreboard.run(model, processor, settings, watch)
    screen.print(scoreboard_tables.overview(result))
    screen.print(scoreboard_tables.note(result, "± half the 95 % interval"), style="dim")
    return result


def _make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"The folder {str(path)!r} cannot be made: {error.strerror}.") from error
    return path


def _case(index: int, processor: Any) -> Case:
    """Test scene number `index` with its question, the tasks taking turns."""
    from vistoken.eval.scenes import draw, make_scene

    scene = make_scene(index)
    question = _question(scene, scoreboard.SCORED[index % len(scoreboard.SCORED)])
    picture = draw(scene)
    prompt = scoreboard.to_prompt(processor, question.text)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    return Case(picture, question.text, question.answer, inputs)


def _question(scene: Any, task: str) -> Any:
    """The hard question of a task: about the smallest thing, or for all things to be counted."""
    from vistoken.eval.scenes import questions

    area = {thing.kind: thing.area for thing in scene.things}
    asked = [q for seed in range(16) for q in questions(scene, tasks=(task,), seed=seed)]
    if task == "count":
        return next(q for q in asked if q.about is None)
    present = [q for q in asked if q.about in area] or questions(scene)[:1]
    return min(present, key=lambda q: area[q.about])


def _answer(
    model: Any, processor: Any, cases: Sequence[Case], method: str | None, keep: int
) -> list[Reply]:
    """Answer every case with the model's own `generate`, greedily, after one to warm up."""
    # Keeping all tokens leaves the model bare, and its attachment still reports what that costs.
    with vistoken.prune_visual_tokens(model, keep=keep, method=method or METHOD) as attached:
        model.generate(**cases[0].inputs, max_new_tokens=1, do_sample=False)
        replies = []
        for case in cases:
            began = time.perf_counter()
            out = model.generate(**case.inputs, max_new_tokens=16, do_sample=False)
            seconds = time.perf_counter() - began
            new = out[0, case.inputs["input_ids"].shape[1] :]
            text = processor.decode(new, skip_special_tokens=True).strip()
            replies.append(Reply(text, text == case.truth, attached.report(), seconds))
    return replies


Replies = dict[str | None, list[Reply]]


def _title(method: str | None, replies: Replies) -> str:
    tokens = replies[method][0].report.tokens_out[0]
    if method is None:
        return f"all {tokens} tokens"
    return f"{tokens} at random" if method == CONTROL else f"{tokens} by {method}"


def _answers_table(cases: Sequence[Case], replies: Replies) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("question", "right answer", *(_title(method, replies) for method in replies)):
        table.add_column(heading)
    for i, case in enumerate(cases):
        cells = [
            Text(reply.text, "green") if reply.right else Text(f"{reply.text} (wrong)", "red")
            for reply in (row[i] for row in replies.values())
        ]
        table.add_row(case.question, case.truth, *cells)
    return table


def _savings_table(replies: Replies) -> Table:
    dense, short = replies[None][0].report, replies[METHOD][0].report
    before, after = (
        statistics.median(reply.seconds for reply in replies[method]) for method in (None, METHOD)
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("one picture", _title(None, replies), _title(METHOD, replies), ""):
        table.add_column(heading, justify="right" if heading != "one picture" else "left")
    rows = (
        ("visual tokens", str, dense.tokens_out[0], short.tokens_out[0]),
        ("prefill FLOPs", flops, dense.flops, short.flops),
        ("KV cache", memory, dense.kv_bytes, short.kv_bytes),
        ("time of an answer", lambda value: f"{1000 * value:.0f} ms", before, after),
    )
    for name, write, old, new in rows:
        table.add_row(name, write(old), write(new), change(old, new))
    return table


def _draw(folder: Path, cases: Sequence[Case], replies: Replies, grid: Any) -> list[Path]:
    """Write the sheet of all scenes, and the first scene by itself for trying commands on it."""
    panels = []
    for i, case in enumerate(cases):
        tiles = []
        for method, row in replies.items():
            picture = case.picture
            if method is not None:
                picture = draw_kept(picture, row[i].report.kept[0], grid)
            tone = "good" if row[i].right else "bad"
            tiles.append(Tile(picture, f"{_title(method, replies)}: {row[i].text}", tone))
        panels.append(Panel(f"{case.question}  ({case.truth})", tiles))
    count, total = replies[METHOD][0].report.tokens_out[0], grid[0] * grid[1]
    heading = f"A LLaVA that reads {count} of {total} visual tokens: what it sees, what it answers"
    files = [folder / "scenes.png", folder / "scene.png"]
    save_picture(draw_sheet(panels, heading=heading), files[0])
    save_picture(cases[0].picture, files[1])
    return files


def find_photos() -> list[Path]:
    """Return the photographs of installed packages, without importing those."""
    found = []
    for package, file in PHOTOS:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations if spec else None) or ():
            if (Path(place) / file).is_file():
                found.append(Path(place) / file)
    return found


def _draw_photos(
    folder: Path, model: Any, processor: Any, keep: int, grid: tuple[int, int]
) -> list[Path]:
    """Write what the method keeps of photographs, which the small model cannot speak about."""
    import torch

    panels = []
    for path in find_photos():
        photo = open_picture(path)
        prompt = scoreboard.to_prompt(processor, "describe the image.")
        inputs = processor(images=photo, text=prompt, return_tensors="pt")
        tiles = [Tile(photo, "all tokens", "pale")]
        for tokens in (3 * keep, keep):
            with (
                vistoken.prune_visual_tokens(model, keep=tokens, method=METHOD) as attached,
                torch.no_grad(),
            ):
                model(**inputs, logits_to_keep=1)
                kept = attached.report().kept[0]
            tiles.append(Tile(draw_kept(photo, kept, grid), f"{len(kept)} by {METHOD}", "pale"))
        panels.append(Panel("", tiles))
    if not panels:
        return []
    heading = f"What {METHOD} keeps of photographs"
    save_picture(draw_sheet(panels, heading=heading), folder / "photos.png")
    return [folder / "photos.png"]


def _as_dict(
    cases: Sequence[Case],
    replies: Replies,
    keep: int,
    result: Any,
    files: Sequence[Path],
    seconds: float,
) -> dict[str, Any]:
    scenes = [
        {
            "question": case.question,
            "truth": case.truth,
            "answers": {
                method or "all tokens": {
                    "text": row[i].text,
                    "right": row[i].right,
                    "seconds": row[i].seconds,
                    "report": row[i].report.to_dict(),
                }
                for method, row in replies.items()
            },
        }
        for i, case in enumerate(cases)
    ]
    return {
        "keep": keep,
        "scenes": scenes,
        "scoreboard": None if result is None else asdict(result),
        "files": [str(path) for path in files],
        "seconds": seconds,
    }
