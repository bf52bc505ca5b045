"""Scenes as files: pictures, COCO annotations and questions, for any program that reads those.

python -m vistoken.eval.scene_export DIR --count 300

DIR/images/*.png                 the pictures
DIR/annotations/instances.json   COCO instances: boxes, areas, categories
DIR/annotations/captions.json    COCO captions
DIR/questions.jsonl              open questions: id, image, question, answers, type
DIR/pope_{random,popular,adversarial}.jsonl    yes/no questions in the form POPE releases them
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vistoken.errors import DataError, VistokenError
from vistoken.eval import pope, records


def export_scenes(
    folder: str | Path,
    *,
    count: int = 300,
    split: str = "test",
    seed: int = 0,
    per_image: int = 1,
) -> dict[str, int]:
    """Write `count` scenes of a split into `folder`; returns how many of each thing were written.

    The same arguments give the same annotations and pixels on every machine. Raises `DataError`
    for a folder that cannot be written, and for a count or a split that is not allowed.
    """
    from vistoken.eval.items import scene_objects, scene_questions
    from vistoken.eval.scenes import coco_annotations, draw, make_scenes

    if count < 1:
        raise DataError(f"count must be at least 1, got {count}")
    folder = Path(folder)
    scenes = make_scenes(count, split, seed)
    document = coco_annotations(scenes)
    images, annotations = folder / "images", folder / "annotations"
    try:
        images.mkdir(parents=True, exist_ok=True)
        annotations.mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}") from error
    asked: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for scene, image in zip(scenes, document["images"], strict=True):
        name = image["file_name"]
        draw(scene).save(images / name)
        objects.append({"image": name, "objects": scene_objects(scene)})
        asked += [
            {"id": q.id, "image": name, "question": q.text, "answers": q.answers, "type": q.type}
            for q in scene_questions(scene)
        ]
    written = {"images": len(scenes), "questions": len(asked)}
    written |= _write_annotations(annotations, document)
    records.write(folder / "questions.jsonl", asked)
    for strategy in pope.STRATEGIES:
        questions = pope.build(objects, strategy, per_image=per_image, num_images=None, seed=seed)
        records.write(folder / f"pope_{strategy}.jsonl", [q.to_dict() for q in questions])
        written[f"pope_{strategy}"] = len(questions)
    return written


def _write_annotations(folder: Path, document: dict[str, Any]) -> dict[str, int]:
    """Write instances and captions as two files, as COCO does."""
    parts = {
        "instances": [a for a in document["annotations"] if "category_id" in a],
        "captions": [a for a in document["annotations"] if "caption" in a],
    }
    for name, entries in parts.items():
        content = {"images": document["images"], "annotations": entries}
        if name == "instances":
            content["categories"] = document["categories"]
        (folder / f"{name}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    return {name: len(entries) for name, entries in parts.items()}


def export(
    folder: Annotated[Path, typer.Argument(help="Folder to write, made if it does not exist.")],
    count: Annotated[int, typer.Option(help="Number of pictures.", min=1)] = 300,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of the stream of scenes.")] = 0,
    per_image: Annotated[
        int, typer.Option(help="POPE questions with yes, and with no, per picture.", min=1)
    ] = 1,
) -> None:
    """Write scenes as pictures, COCO annotations and questions."""
    try:
        written = export_scenes(folder, count=count, split=split, seed=seed, per_image=per_image)
    except VistokenError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    told = ", ".join(f"{number} {name}" for name, number in written.items())
    typer.echo(f"{folder}: {told}")


app = typer.Typer(help="Generated scenes.", add_completion=False)
app.command()(export)


@app.callback()
def _scenes() -> None:
    """Generated scenes."""


if __name__ == "__main__":
    typer.run(export)
