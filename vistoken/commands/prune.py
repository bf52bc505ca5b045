"""`vistoken prune`: one picture, one prompt, with all visual tokens and with few."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table
from rich.text import Text

import vistoken
from vistoken.commands.loading import complete_prompt, load_model, quiet, read_method
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
from vistoken.picture import (
    Panel,
    Tile,
    check_picture_path,
    draw_kept,
    draw_sheet,
    open_picture,
    save_picture,
    seen_box,
)


@dataclass(frozen=True)
class Run:
    """One answer, its length in tokens, and the seconds that `generate` took for it."""

    text: str
    tokens: int
    seconds: float

    @property
    def time(self) -> str:
        """Seconds and tokens, to be read together."""
        return f"{self.seconds:.2f} s for {self.tokens} tokens"


@fails_clearly
def prune(
    image: Annotated[Path, typer.Option(help="Image file.")],
    prompt: Annotated[
        str, typer.Option(help="Prompt, with the image placeholder or for the chat template.")
    ],
    model: Annotated[
        str, typer.Option(help="Local checkpoint folder, or `shipped` for the model inside.")
    ] = "shipped",
    keep: Annotated[int | None, typer.Option(help="Visual tokens that stay.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of them removed, 0 to 1.")] = None,
    method: Annotated[str, typer.Option(help="Pruning method.")] = vistoken.DEFAULT_PRUNING,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the method, as key=value; repeatable.")
    ] = None,
    save_to: Annotated[
        Path | None, typer.Option("--save-picture", help="Image file to write: what was kept.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 64,
    compare: Annotated[bool, typer.Option(help="Answer with all tokens, too.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answer a prompt about a picture with pruned visual tokens, and say what that saved."""
    chosen = read_method(method, ratio, keep, option or [])
    picture = open_picture(image)
    if save_to is not None:
        check_picture_path(save_to)
    with busy("reading the model"):
        loaded, processor = load_model(model, device)
    text = complete_prompt(processor, prompt)
    inputs = processor(images=picture, text=text, return_tensors="pt").to(loaded.device)
    with quiet(), busy("answering"):
        bare = _generate(loaded, processor, inputs, max_new_tokens) if compare else None
        with vistoken.attach(loaded, chosen) as attached:
            pruned = _generate(loaded, processor, inputs, max_new_tokens)
            report = attached.report()
    if save_to is not None:
        grid = vistoken.inspect(loaded).facts.grid
        box_seen = seen_box(picture.size, processor.image_processor)
        lit = draw_kept(picture, report.kept[0], grid, box=box_seen)
        tiles = [
            Tile(picture, f"{report.tokens_in[0]} tokens{_colon(bare)}"),
            Tile(lit, f"{report.tokens_out[0]} by {chosen.name}{_colon(pruned)}"),
        ]
        title = text.replace(processor.image_token, " ")
        save_picture(draw_sheet([Panel(title, tiles)], tile=448), save_to)
    if as_json:
        print_json(_as_dict(chosen, text, bare, pruned, report, save_to))
    else:
        _show(chosen, bare, pruned, report, save_to)


def _generate(model: Any, processor: Any, inputs: Any, limit: int) -> Run:
    """Answer once to warm up, with one token, and then in full, greedily."""
    settings = {"do_sample": False, "num_beams": 1}
    model.generate(**inputs, max_new_tokens=1, **settings)
    _synchronize(model)
    began = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=limit, **settings)
    _synchronize(model)
    seconds = time.perf_counter() - began
    new = out[0, inputs["input_ids"].shape[1] :]
    return Run(processor.decode(new, skip_special_tokens=True).strip(), len(new), seconds)


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _colon(run: Run | None) -> str:
    return "" if run is None else f": {run.text}"


def _as_dict(
    method: vistoken.Method,
    text: str,
    bare: Run | None,
    pruned: Run,
    report: vistoken.Report,
    saved: Path | None,
) -> dict[str, Any]:
    return {
        "method": method.to_dict(),
        "prompt": text,
        "answer": asdict(pruned),
        "answer_all_tokens": None if bare is None else asdict(bare),
        "report": report.to_dict(),
        "picture": None if saved is None else str(saved),
    }


def _show(
    method: vistoken.Method,
    bare: Run | None,
    pruned: Run,
    report: vistoken.Report,
    saved: Path | None,
) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "all tokens", str(method), ""):
        table.add_column(heading, overflow="fold")
    table.add_row("answer", Text("" if bare is None else bare.text), Text(pruned.text, "bold"))
    before, after = sum(report.tokens_in), sum(report.tokens_out)
    table.add_row("visual tokens", str(before), str(after), change(before, after))
    for name, write, dense, short in (
        ("prefill FLOPs", flops, report.flops_dense, report.flops),
        ("KV cache", memory, report.kv_bytes_dense, report.kv_bytes),
    ):
        table.add_row(name, write(dense), write(short), change(dense, short))
    table.add_row("time", "" if bare is None else bare.time, pruned.time)
    out = console()
    out.print(table)
    if saved is not None:
        out.print(Text(f"What was kept: {saved}"))
