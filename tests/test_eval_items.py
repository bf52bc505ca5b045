"""Data of an evaluation: scenes, COCO files, JSONL files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vistoken.errors import DataError, MethodError
from vistoken.eval import chair
from vistoken.eval.items import Data, Picture, load_data
from vistoken.eval.scene_export import export_scenes
from vistoken.eval.scenes import caption, draw, make_scene, make_scenes, mentioned, truth
from vistoken.eval.tasks import Plan, Protocol, compare, make_plan, score


def write_prompt(question: str) -> str:
    return f"USER: <image>\n{question} ASSISTANT:"


def plan_of(data: Data, *tasks: str, **settings: Any) -> Plan:
    return make_plan(data, tasks or None, Protocol(**settings), write_prompt)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    export_scenes(folder, count=12)
    return folder


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Two pictures of 8 x 8 pixels."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def jsonl(folder: Path, *lines: Any) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "q.jsonl").write_text("\n".join(texts) + "\n")
    return f"jsonl:{folder / 'q.jsonl'}"


def asked(number: int, **changes: Any) -> dict[str, Any]:
    return {"id": number, "image": "a.png", "question": "what?", "answers": ["red"], **changes}


# --- scenes --------------------------------------------------------------------------------------


def test_scenes_hold_the_truth_and_are_the_same_every_time() -> None:
    data, again = load_data(images=5), load_data(images=5)
    assert data.digest == again.digest
    for picture, scene in zip(data.pictures, make_scenes(5), strict=True):
        assert picture.objects is not None and set(picture.objects) == truth(scene)
        assert picture.open().tobytes() == draw(scene).tobytes()
    assert data.digest != load_data(images=5, seed=1).digest
    assert data.digest != load_data("scenes:val", images=5).digest
    assert data.tasks == ("pope", "chair", "vqa")


def test_the_lexicon_of_scenes_finds_what_scenes_say() -> None:
    lexicon = load_data(images=1).lexicon
    for i in range(200):
        text = caption(make_scene(i))
        assert chair.mentioned(text, lexicon) == mentioned(text)


# --- export and COCO -----------------------------------------------------------------------------


def test_export_gives_the_questions_of_the_scenes(exported: Path) -> None:
    """The files, read back by other readers, ask and answer what the scenes do."""
    scenes = plan_of(load_data(images=12))
    questions = plan_of(load_data(f"jsonl:{exported / 'questions.jsonl'}"))
    assert [e.truth for e in questions.splits["vqa"]] == [e.truth for e in scenes.splits["vqa"]]
    assert [a.prompt for a in questions.asks] == [
        scenes.asks[entry.ask].prompt for entry in scenes.splits["vqa"]
    ]
    for strategy in ("random", "popular", "adversarial"):
        file = plan_of(load_data(f"jsonl:{exported / f'pope_{strategy}.jsonl'}"))
        mine, theirs = scenes.splits[f"pope/{strategy}"], file.splits["pope/file"]
        assert [e.truth for e in mine] == [e.truth for e in theirs]
        assert [scenes.asks[e.ask].prompt for e in mine] == [
            file.asks[e.ask].prompt for e in theirs
        ]


def test_exported_pictures_are_the_drawn_ones(exported: Path) -> None:
    data = load_data(f"coco:{exported}")
    for picture, scene in zip(data.pictures, make_scenes(12), strict=True):
        assert picture.name == str(scene.image_id)
        assert picture.open().tobytes() == draw(scene).tobytes()


def test_coco_truth_is_instances_and_captions(exported: Path) -> None:
    pytest.importorskip("pycocotools")
    data = load_data(f"coco:{exported}")
    for picture, scene in zip(data.pictures, make_scenes(12), strict=True):
        assert picture.objects is not None and set(picture.objects) == truth(scene)
    assert data.tasks == ("pope", "chair")
    file = load_data(f"coco:{exported / 'annotations' / 'instances.json'}")
    assert file.digest == data.digest


def coco_files(folder: Path, **changes: Any) -> Path:
    content = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 7, "name": "dog"}, {"id": 8, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7},
            {"id": 2, "image_id": 2, "category_id": 8},
        ],
    }
    (folder / "instances_x.json").write_text(json.dumps({**content, **changes}))
    texts = {1: "A dog and a person.", 2: "Hm."}
    said = [{"id": i, "image_id": i, "caption": text} for i, text in texts.items()]
    captions = {"images": content["images"], "annotations": said}
    (folder / "captions_x.json").write_text(json.dumps(captions))
    return folder


def test_coco_captions_add_objects_and_silence_pycocotools(
    shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_data(f"coco:{coco_files(shapes)}")
    assert [p.objects for p in data.pictures] == [("dog", "person"), ("cat",)]
    assert capsys.readouterr().out == ""
    (shapes / "captions_x.json").unlink()
    alone = load_data(f"coco:{shapes}")
    assert [p.objects for p in alone.pictures] == [("dog",), ("cat",)]
    assert "instances alone" in alone.revision and alone.digest != data.digest


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"images": []}, "'images' must be a list"),
        ({"images": [{"id": 1, "file_name": "a.png"}] * 2}, r"images\[1\] repeats the id 1"),
        ({"images": [{"id": 1}]}, r"images\[0\]: the field 'file_name' is missing"),
        ({"annotations": [{"id": 1, "image_id": 9, "category_id": 7}]}, "of no image: 9"),
        ({"annotations": [{"id": 1, "image_id": 1, "category_id": 9}]}, "has no category: 9"),
        ({"images": [{"id": 1, "file_name": "no.png"}]}, "of no image: 2|no.png"),
    ],
)
def test_bad_coco_is_refused(shapes: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(DataError, match=why):
        load_data(f"coco:{coco_files(shapes, **changes)}")


def test_missing_coco_parts_are_named(shapes: Path) -> None:
    with pytest.raises(DataError, match="must hold one file instances"):
        load_data(f"coco:{shapes}")
    coco_files(shapes)
    with pytest.raises(DataError, match="--image-folder"):
        load_data(f"coco:{shapes}", image_folder=shapes / "nowhere")
    (shapes / "instances_x.json").write_text('{"images": [\n1,]}')
    with pytest.raises(DataError, match=r"instances_x.json:2: not JSON"):
        load_data(f"coco:{shapes}")


# --- JSONL ---------------------------------------------------------------------------------------


def test_jsonl_reads_one_answer_ten_times_and_ten_as_they_are(shapes: Path) -> None:
    ten = [{"answer": "red"}] * 9 + [{"answer": "blue"}]
    source = jsonl(shapes, asked(1), "", asked(2, image="b.png", answers=ten, type="color"))
    data = load_data(source)
    first, second = (picture.questions[0] for picture in data.pictures)
    assert first.answers == ("red",) * 10 and first.type is None
    assert second.answers == ("red",) * 9 + ("blue",) and second.type == "color"
    assert len(load_data(source, images=1).pictures) == 1


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{not json", r"q.jsonl:2: not JSON"),
        ("[1]", r"q.jsonl:2: each record must be a JSON object"),
        (asked(1), r"q.jsonl:2: the id 1 occurs twice, first at .*q.jsonl:1"),
        (asked(2, image="c.png"), r"q.jsonl:2: there is no picture 'c.png'"),
        (asked(2, answers=[]), r"q.jsonl:2: the field 'answers'"),
        (asked(2, answers=["a", "b"]), r"q.jsonl:2: the field 'answers'"),
        (asked(2, answers=[1]), r"q.jsonl:2: the field 'answers'"),
        (asked(2, question=" "), r"q.jsonl:2: the question is empty"),
        (asked(2, label="maybe"), r"q.jsonl:2: the field 'label' is 'maybe'"),
        ({"id": 2, "image": "a.png"}, r"q.jsonl:2: the field 'question' is missing"),
    ],
)
def test_bad_lines_are_refused_with_file_and_line(shapes: Path, line: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        load_data(jsonl(shapes, asked(1), line))


def test_a_file_that_is_no_picture_is_refused(shapes: Path) -> None:
    (shapes / "a.png").write_text("hello")
    with pytest.raises(DataError, match="a.png: the picture cannot be read"):
        load_data(jsonl(shapes, asked(1))).pictures[0].open()


@pytest.mark.parametrize("source", ["", "coco", "coco:", "scenes:", "hub:x", "jsonl:/nowhere"])
def test_unknown_sources_are_refused(source: str) -> None:
    with pytest.raises(DataError):
        load_data(source)


def test_bad_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 1"):
        load_data(images=0)
    with pytest.raises(DataError, match="split must be one of"):
        load_data("scenes:nosuch", images=1)
    with pytest.raises(DataError, match="count must be"):
        export_scenes(tmp_path, count=0)


# --- tasks ---------------------------------------------------------------------------------------


def test_pope_asks_for_what_is_there_and_for_what_is_not() -> None:
    data = load_data(images=20)
    plan = plan_of(data, "pope", per_image=1)
    for name, entries in plan.splits.items():
        assert [entry.truth for entry in entries] == ["yes", "no"] * 20, name
        for entry in entries:
            ask = plan.asks[entry.ask]
            named = chair.mentioned(ask.prompt, data.lexicon)
            objects = data.pictures[ask.picture].objects
            assert objects is not None and len(named) == 1
            assert (named[0] in objects) == (entry.truth == "yes")
    one, two, three = ([entry.ask for entry in entries][::2] for entries in plan.splits.values())
    assert one == two == three, "the positive questions are the same, and asked once"
    assert len({(ask.picture, ask.prompt) for ask in plan.asks}) == len(plan.asks)


def test_pictures_with_too_few_objects_are_noted() -> None:
    data = load_data(images=20)
    few = sum(len(picture.objects or ()) < 3 for picture in data.pictures)
    plan = plan_of(data, "pope", per_image=3)
    assert few and f"{few} of 20 pictures" in plan.notes[0]


def test_scores_of_known_answers() -> None:
    plan = plan_of(load_data(images=10))
    right = [""] * len(plan.asks)
    for name, entries in plan.splits.items():
        for entry in entries:
            texts = {"chair": " and a ".join(entry.truth), "vqa": entry.truth[0]}
            right[entry.ask] = texts.get(name, entry.truth)
    perfect = score(plan, right)
    assert perfect["pope"].accuracy == 1 and perfect["vqa"].accuracy == 100
    assert (perfect["chair"].chair_i, perfect["chair"].recall) == (0, 1)
    assert perfect["pope"].n == 3 * perfect["pope/random"].n
    silent = score(plan, [""] * len(plan.asks))
    assert [silent[name].parsed for name in ("pope", "chair", "vqa")] == [0, 0, 0]
    assert silent["pope"].empty == silent["pope"].n
    worse = compare(perfect, silent, plan)
    assert worse["pope"].differences["accuracy"].value == -1
    assert worse["pope"].mcnemar is None, "its positives count three times"
    assert worse["pope/popular"].mcnemar is not None
    assert worse["pope/popular"].mcnemar.only_first == 20


def test_prompts_limits_and_data_are_in_the_digest() -> None:
    data = load_data(images=3)
    plain = plan_of(data, "vqa").digest
    assert plain == plan_of(data, "vqa").digest
    changed = [
        plan_of(data, "vqa", suffix="none").digest,
        plan_of(data, "vqa", answer_tokens=3).digest,
        plan_of(data, "vqa", "chair").digest,
        plan_of(load_data(images=4), "vqa").digest,
    ]
    assert len({plain, *changed}) == 5
    assert plan_of(data, "vqa", parser="official").digest == plain, "parsing comes after answers"


@pytest.mark.parametrize(
    "settings",
    [
        {"suffix": "x"},
        {"parser": "x"},
        {"vqa_mode": "x"},
        {"lemmatizer": "x"},
        {"per_image": 0},
        {"answer_tokens": 0},
        {"resamples": -1},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=next(iter(settings))):
        Protocol(**settings)


def test_tasks_that_do_not_fit_are_refused(shapes: Path) -> None:
    data = load_data(jsonl(shapes, asked(1)))
    with pytest.raises(DataError, match="no task 'mmlu'; tasks: pope, chair, vqa"):
        plan_of(data, "mmlu")
    with pytest.raises(DataError, match="nothing for the task pope; it serves: vqa"):
        plan_of(data, "vqa", "pope")
    empty = Data("x", "x", "x", (Picture("a", shapes / "a.png"),))
    with pytest.raises(DataError, match="it serves: no task"):
        plan_of(empty)
    with pytest.raises(DataError, match="1 answers"):
        score(plan_of(load_data(images=2)), ["yes"])
