"""Data of an evaluation: pictures with their objects, captions and questions.

    scenes[:SPLIT]   generated scenes (`vistoken.eval.scenes`), the split `test` unless named
    coco:PATH        COCO annotation files: a folder, or an instances file
    jsonl:PATH       questions about local pictures, one JSON object per line

Everything is read from local files; nothing is ever downloaded. Refusals name file and line.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistoken import __version__
from vistoken.errors import BackendUnavailable, DataError
from vistoken.eval import chair, pope, records

if TYPE_CHECKING:
    from PIL.Image import Image

SINGLE_ANSWER_TIMES = 10
SCENE_TASKS = ("color", "count", "quadrant", "left_of")
_DEFAULT_IMAGES = {"scenes": 300, "coco": 500, "jsonl": None}


@dataclass(frozen=True)
class VqaQuestion:
    """An open question about a picture, the answers of several people, and its type if known."""

    id: records.Id
    text: str
    answers: tuple[str, ...]
    type: str | None = None


@dataclass(frozen=True)
class Picture:
    """A picture and what is known about it.

    `source` is a path or a scene. `objects` are the distinct objects in it, None if that is not
    known. `yes_no` are questions with a label that come with the data.
    """

    name: str
    source: Any
    objects: tuple[str, ...] | None = None
    questions: tuple[VqaQuestion, ...] = ()
    yes_no: tuple[pope.Question, ...] = ()

    def open(self) -> Image:
        """Return the picture in RGB, upright; raises `DataError` if the file is no picture."""
        try:
            from PIL import Image, ImageOps
        except ImportError as error:
            raise BackendUnavailable("pictures need Pillow: pip install 'vistoken[vlm]'") from error
        if not isinstance(self.source, Path):
            from vistoken.eval.scenes import draw

            return draw(self.source)
        try:
            with Image.open(self.source) as file:
                return ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.source}: the picture cannot be read ({error})") from error


@dataclass(frozen=True)
class Data:
    """The pictures of an evaluation.

    `revision` says in words what they are. `digest` is a SHA-256 over annotations, questions and
    the names and file sizes of the pictures. `lexicon` finds the objects in captions.
    """

    source: str
    revision: str
    digest: str
    pictures: tuple[Picture, ...]
    lexicon: chair.Lexicon | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that these pictures can be used for."""
        objects = any(picture.objects for picture in self.pictures)
        labeled = any(picture.yes_no for picture in self.pictures)
        asked = any(picture.questions for picture in self.pictures)
        able = {"pope": objects or labeled, "chair": objects and self.lexicon, "vqa": asked}
        return tuple(task for task, can in able.items() if can)


def load_data(
    source: str = "scenes",
    *,
    images: int | None = None,
    seed: int = 0,
    image_folder: Path | None = None,
) -> Data:
    """Read the data that `source` names: `scenes[:SPLIT]`, `coco:PATH` or `jsonl:PATH`.

    `images` is the number of pictures (300 scenes, 500 of COCO, all of a JSONL file unless given):
    the first scenes of the stream `seed`, or a draw by `seed` from the files. `image_folder` is
    where the picture files lie, if not beside the annotations. Raises `DataError`.
    """
    kind, colon, place = source.partition(":")
    if kind not in _DEFAULT_IMAGES or (kind != "scenes" and not place) or (colon and not place):
        raise DataError(f"data is {source!r}; allowed: scenes, scenes:SPLIT, coco:PATH, jsonl:PATH")
    count = _DEFAULT_IMAGES[kind] if images is None else images
    if count is not None and count < 1:
        raise DataError(f"the number of images must be at least 1, got {count}")
    if kind == "scenes":
        assert count is not None  # scenes have a default number
        return _scenes(source, place or "test", count, seed)
    path = Path(place).expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist; give a local path, nothing is downloaded")
    read = _coco if kind == "coco" else _jsonl
    return read(source, path, count, seed, image_folder)


def scene_questions(scene: Any) -> tuple[VqaQuestion, ...]:
    """Return the open questions about a scene; their one answer counts for ten people."""
    from vistoken.eval.scenes import questions

    return tuple(
        VqaQuestion(q.question_id, q.text, (q.answer,) * SINGLE_ANSWER_TIMES, q.task)
        for q in questions(scene, tasks=SCENE_TASKS)
    )


def scene_objects(scene: Any) -> tuple[str, ...]:
    """Return the kinds in a scene, shuffled: which of them POPE asks for must not depend on the
    order in which a scene is built.
    """
    from vistoken.eval.scenes import truth

    kinds = sorted(truth(scene))
    random.Random(f"vistoken objects {scene.image_id}").shuffle(kinds)
    return tuple(kinds)


def _scenes(source: str, split: str, count: int, seed: int) -> Data:
    from vistoken.eval.scenes import KINDS, coco_annotations, make_scenes

    scenes = make_scenes(count, split, seed)
    pictures = tuple(
        Picture(
            name=str(scene.image_id),
            source=scene,
            objects=scene_objects(scene),
            questions=scene_questions(scene),
        )
        for scene in scenes
    )
    lexicon = chair.Lexicon.from_synonyms({kind: () for kind in KINDS})
    painted = hashlib.sha256(pictures[0].open().tobytes()).hexdigest()
    digest = _digest(coco_annotations(scenes), [p.questions for p in pictures], painted)
    revision = f"scenes {split} 0 to {count - 1}, seed {seed}, of vistoken {__version__}"
    return Data(source, revision, digest, pictures, lexicon)


def _coco(source: str, path: Path, count: int | None, seed: int, folder: Path | None) -> Data:
    instances, captions = _annotation_files(path)
    table = _read_coco(instances, ("images", "annotations", "categories"))
    said = _read_coco(captions, ("images", "annotations")) if captions else None
    names = [category["name"] for category in table.dataset["categories"]]
    lexicon = chair.Lexicon.coco()
    if not set(names) <= set(lexicon.objects):
        lexicon = chair.Lexicon.from_synonyms({name: () for name in names})
    chosen = _choose(sorted(table.imgs), count, seed)
    documents = () if said is None else (said.dataset,)
    truth = chair.coco_truth(table.dataset, documents, image_ids=chosen, lexicon=lexicon)
    place = _image_folder(instances, table.imgs[chosen[0]]["file_name"], folder)
    pictures = []
    for image in chosen:
        file = place / table.imgs[image]["file_name"]
        if not file.is_file():
            raise DataError(f"{instances}: the picture {file} of image {image} does not exist")
        drawn = [lexicon.node(table.cats[a["category_id"]]["name"]) for a in table.imgToAnns[image]]
        objects = dict.fromkeys([*drawn, *sorted(truth[image])])
        pictures.append(Picture(str(image), file, tuple(objects)))
    files = [file for file in (instances, captions) if file]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    told = [f"{file.name} {code[:12]}" for file, code in zip(files, hashes, strict=True)]
    revision = f"{', '.join(told)}; {len(chosen)} of {len(table.imgs)} images, seed {seed}"
    if captions is None:
        revision += "; no captions file, so the truth is that of the instances alone"
    digest = _digest(hashes, [(p.name, p.source.stat().st_size) for p in pictures])
    return Data(source, revision, digest, tuple(pictures), lexicon)


def _annotation_files(path: Path) -> tuple[Path, Path | None]:
    """Find the instances file and, where there is one, the captions file of the same pictures."""
    if path.is_dir():
        found = sorted(path.glob("instances*.json"))
        found = found or sorted(path.glob("annotations/instances*.json"))
        if len(found) != 1:
            told = ", ".join(str(file) for file in found) or "none"
            raise DataError(
                f"{path} must hold one file instances*.json, there or in annotations/, found "
                f"{told}: name the file, as in coco:{path / 'annotations/instances_val2014.json'}"
            )
        path = found[0]
    captions = path.with_name(path.name.replace("instances", "captions"))
    return path, captions if captions != path and captions.is_file() else None


def _read_coco(path: Path, parts: Sequence[str]) -> Any:
    """Read an annotation file into the index of pycocotools, after a check of its entries."""
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise BackendUnavailable(
            "COCO annotations need pycocotools: pip install 'vistoken[eval]'"
        ) from error
    document = records.load(path)
    if not isinstance(document, Mapping):
        raise DataError(f"{path}: a COCO file is one JSON object, got {type(document).__name__}")
    needed = {
        "images": ("id", "file_name"),
        "categories": ("id", "name"),
        "annotations": ("id", "image_id", "category_id" if "categories" in parts else "caption"),
    }
    for part in parts:
        entries = document.get(part)
        if not isinstance(entries, list) or not entries:
            raise DataError(f"{path}: {part!r} must be a list with at least one entry")
        seen = set()
        for i, entry in enumerate(entries):
            record = records.record_of(entry, f"{path}: {part}[{i}]")
            for name in needed[part]:
                record.field(name)
            if entry["id"] in seen:
                raise DataError(f"{path}: {part}[{i}] repeats the id {entry['id']!r}")
            seen.add(entry["id"])
    _check_links(path, document)
    table = COCO()
    table.dataset = document
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress by print
        table.createIndex()
    return table


def _check_links(path: Path, document: Mapping[str, Any]) -> None:
    """Refuse annotations of images or categories that the file does not list."""
    images = {image["id"] for image in document["images"]}
    categories = {category["id"] for category in document.get("categories", ())}
    for i, entry in enumerate(document["annotations"]):
        if entry["image_id"] not in images:
            raise DataError(f"{path}: annotations[{i}] is of no image: {entry['image_id']!r}")
        if "category_id" in entry and categories and entry["category_id"] not in categories:
            raise DataError(f"{path}: annotations[{i}] has no category: {entry['category_id']!r}")


def _image_folder(instances: Path, name: str, folder: Path | None) -> Path:
    root = instances.parent.parent if instances.parent.name == "annotations" else instances.parent
    split = instances.stem.rpartition("_")[2]
    places = [root / "images", root / split, root / "images" / split, root]
    for place in [folder] if folder else places:
        if (place / name).is_file():
            return place
    told = ", ".join(str(place) for place in ([folder] if folder else places))
    raise DataError(f"the picture {name} of {instances} is in none of {told}: give --image-folder")


def _jsonl(source: str, path: Path, count: int | None, seed: int, folder: Path | None) -> Data:
    found = records.read(path)
    places: dict[records.Id, str] = {}
    pictures: dict[Path, tuple[list[VqaQuestion], list[pope.Question]]] = {}
    for record in found:
        file = _picture_file(record, [folder] if folder else [path.parent, path.parent / "images"])
        asked, labeled = pictures.setdefault(file, ([], []))
        question = _question(record)
        if question.id in places:
            raise DataError(
                f"{record.place}: the id {question.id!r} occurs twice, first at "
                f"{places[question.id]}"
            )
        places[question.id] = record.place
        if isinstance(question, VqaQuestion):
            asked.append(question)
        else:
            labeled.append(question)
    chosen = _choose(list(pictures), count, seed)
    taken = tuple(
        Picture(_name(file, path.parent), file, None, tuple(asked), tuple(labeled))
        for file, (asked, labeled) in ((file, pictures[file]) for file in chosen)
    )
    code = hashlib.sha256(path.read_bytes()).hexdigest()
    revision = f"{path.name} {code[:12]}; {len(taken)} of {len(pictures)} images, seed {seed}"
    digest = _digest(code, [(p.name, p.source.stat().st_size) for p in taken])
    return Data(source, revision, digest, taken)


def _name(file: Path, folder: Path) -> str:
    return (file.relative_to(folder) if file.is_relative_to(folder) else file).as_posix()


def _question(record: records.Record) -> VqaQuestion | pope.Question:
    """Read one line: with `label` a yes/no question as POPE releases them, else an open one."""
    identity = record.identity("question_id" if "question_id" in record.value else "id")
    text = record.text("text" if "text" in record.value else "question")
    if not text.strip():
        raise DataError(f"{record.place}: the question is empty")
    if "label" in record.value:
        label = record.choice("label", pope.LABELS)
        return pope.Question(identity, record.text("image"), text, label)
    kind = record.text("type") if "type" in record.value else None
    return VqaQuestion(identity, text, _answers(record), kind)


def _answers(record: records.Record) -> tuple[str, ...]:
    from vistoken.eval.vqa import MIN_ANSWERS

    given = record.field("answers")
    if not isinstance(given, list):
        raise DataError(f"{record.place}: the field 'answers' must be a list, got {given!r:.60}")
    texts: list[Any] = [
        entry.get("answer") if isinstance(entry, Mapping) else entry for entry in given
    ]
    if len(texts) == 1:
        texts *= SINGLE_ANSWER_TIMES
    if len(texts) < MIN_ANSWERS or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{record.place}: the field 'answers' must hold one text or at least {MIN_ANSWERS}, "
            f"got {given!r:.80}"
        )
    return tuple(texts)


def _picture_file(record: records.Record, folders: Sequence[Path]) -> Path:
    name = record.text("image")
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    told = ", ".join(str(folder) for folder in folders)
    raise DataError(f"{record.place}: there is no picture {name!r} in {told}")


def _choose(names: list[Any], count: int | None, seed: int) -> list[Any]:
    """Draw `count` of the names, all if there are not more, and keep their order."""
    if count is None or count >= len(names):
        return names
    places = sorted(random.Random(seed).sample(range(len(names)), count))
    return [names[i] for i in places]


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, VqaQuestion):
        return [value.id, value.text, value.answers, value.type]
    raise TypeError(f"{type(value).__name__} has no digest")
