"""The command line: what it prints, what it writes, and one clear line for every bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import tiny
import vistoken
from vistoken.commands.loading import complete_prompt, load_model, read_method
from vistoken.commands.main import app
from vistoken.errors import DataError, MethodError

pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).resolve().parents[1]
SIDE = 14 * tiny.GRID
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_processor(template: str | None = TEMPLATE) -> Any:
    """A LLaVA processor for the tiny model: 60 words and a CLIP image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<image>", "<unk>", "USER", "ASSISTANT", ":", "what", "is"]
    words += [f"word{i}" for i in range(64 - len(words))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as transformers writes it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.tiny_llava().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that the processor has to resize and crop."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.effect_noise((130, 97), 80).convert("RGB").save(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def printed_json(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(words: str, *arguments: object) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that says `words`."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and re.search(words, line), line


# --- prune ---------------------------------------------------------------------------------------


def test_prune_answers_as_the_library_does(checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "kept.png"
    said = printed_json(
        *("prune", "--model", checkpoint, "--image", photo, "--keep", 9),
        *(
            "--method",
            "holov",
            "--option",
            "crops=4",
            "--prompt",
            r"USER: <image>\nwhat is ASSISTANT:",
        ),
        *("--max-new-tokens", 5),
        *("--save-picture", sheet, "--device", "cpu"),
    )
    model, processor = load_model(str(checkpoint), "cpu")
    text = "USER: <image>\nwhat is ASSISTANT:"
    inputs = processor(images=Image.open(photo), text=text, return_tensors="pt")
    new = slice(inputs["input_ids"].shape[1], None)

    def answer() -> str:
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        return processor.decode(out[0, new], skip_special_tokens=True).strip()

    assert said["prompt"] == text
    assert said["answer_all_tokens"]["text"] == answer()
    with vistoken.attach(model, vistoken.HoloV(keep=9, crops=4)) as attached:
        assert said["answer"]["text"] == answer()
        assert said["report"] == attached.report().to_dict()
    assert said["method"]["crops"] == 4 and said["picture"] == str(sheet)
    assert said["answer"]["seconds"] > 0 and said["answer"]["tokens"] == 5
    assert Image.open(sheet).size[0] > 2 * 448


def test_prune_prints_a_table(checkpoint: Path, photo: Path) -> None:
    result = run(
        *("prune", "--model", checkpoint, "--image", photo, "--ratio", 0.75, "--method", "uniform"),
        *("--prompt", "what is", "--max-new-tokens", 3, "--no-compare", "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"visual tokens +36 +9 +-75.0%", result.stdout)
    assert "uniform(ratio=0.75)" in result.stdout
    assert "\x1b" not in result.output  # no escape codes without a terminal


HOLOV = ("--keep", 4, "--method", "holov")
PRUNE = ("prune", "--prompt", "<image> what", "--device", "cpu")


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("give exactly one of ratio and keep, got ratio=None and keep=None", []),
        ("give exactly one of ratio and keep", ["--keep", 4, "--ratio", 0.5]),
        ("ratio must be at least 0 and below 1, got 1.0", ["--ratio", 1]),
        ("ratio must be .* got -0.2", ["--ratio", -0.2]),
        ("ratio must be .* got nan", ["--ratio", "nan"]),
        ("keep must be at least 1, got 0", ["--keep", 0]),
        ("no method 'holow'. Did you mean 'holov'", ["--keep", 4, "--method", "holow"]),
        ("no option 'crop'. Did you mean 'crops'", [*HOLOV, "--option", "crop=2"]),
        ("crops must be .* got 'many'", [*HOLOV, "--option", "crops=many"]),
        ("crops must be .* got 1.5", [*HOLOV, "--option", "crops=1.5"]),
        ("mode must be one of .* got 'fast'", [*HOLOV, "--option", "mode=fast"]),
        ("written key=value, got 'crops'", ["--keep", 4, "--option", "crops"]),
        ("'keep' is given twice", ["--keep", 4, "--option", "keep=5"]),
    ],
)
def test_prune_refuses_bad_methods(words: str, arguments: list[object], photo: Path) -> None:
    refused(words, *PRUNE, "--image", photo, *arguments)


def test_prune_refuses_bad_files(photo: Path, tmp_path: Path) -> None:
    wanted = (*PRUNE, "--keep", 4)
    refused("no image file '.*absent.png'", *wanted, "--image", tmp_path / "absent.png")
    refused("no image file", *wanted, "--image", tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    refused("is not an image", *wanted, "--image", tmp_path / "text.png")
    wanted = (*wanted, "--image", photo)
    refused("no folder .*to write", *wanted, "--save-picture", tmp_path / "absent" / "a.png")
    refused("does not end like an image", *wanted, "--save-picture", tmp_path / "a.txt")


def test_prune_refuses_bad_folders(checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    wanted = (*PRUNE, "--keep", 4, "--image", photo, "--model")
    refused("no folder '.*absent'", *wanted, tmp_path / "absent")
    refused("is a file, not a checkpoint folder", *wanted, photo)
    refused("has no config.json", *wanted, tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused("config.json cannot be used", *wanted, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    refused("config.json cannot be used", *wanted, tmp_path)
    shutil.copy(checkpoint / "config.json", tmp_path)
    refused("cannot be loaded: .*model.safetensors", *wanted, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08" + bytes(20))
    refused("cannot be loaded", *wanted, tmp_path)
    shutil.copy(checkpoint / "model.safetensors", tmp_path)
    refused("cannot be loaded|no full processor", *wanted, tmp_path)


def test_prune_refuses_weights_with_holes(checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "holes"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "linear_1.weight" in name)
    save_file(
        {name: value for name, value in weights.items() if name != gone},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    refused(
        "lack 1 tensors .*linear_1.weight",
        *PRUNE,
        *("--keep", 4, "--image", photo),
        "--model",
        folder,
    )


def test_another_architecture_is_refused_before_its_weights_are_read(
    photo: Path, tmp_path: Path
) -> None:
    from transformers import BertConfig, CLIPVisionConfig, LlavaConfig, SiglipVisionConfig

    wanted = (*PRUNE, "--keep", 4, "--image", photo, "--model", tmp_path)
    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path)
    refused("No host knows BertModel.*Supported models: .*LLaVA-1.5", *wanted)
    CLIPVisionConfig().save_pretrained(tmp_path)
    refused("No host knows CLIPVisionModel", *wanted)
    LlavaConfig(vision_config=SiglipVisionConfig(num_hidden_layers=2)).save_pretrained(tmp_path)
    refused("LLaVA-1.5 with a CLIP tower, but has no", *wanted)


def test_code_in_a_checkpoint_is_not_run(photo: Path, tmp_path: Path) -> None:
    config = {"model_type": "custom", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    refused(
        "config.json cannot be used", *PRUNE, *("--keep", 4, "--image", photo, "--model", tmp_path)
    )
    assert not (tmp_path / "ran").exists()


def test_prune_refuses_bad_prompts(checkpoint: Path, photo: Path) -> None:
    wanted = ("prune", "--keep", 4, "--image", photo, "--model", checkpoint, "--device", "cpu")
    refused("<image> 2 times, but there is one image", *wanted, "--prompt", "<image><image> what")
    refused("prompt is empty", *wanted, "--prompt", "  ")


def test_prompts_without_a_placeholder() -> None:
    made = complete_prompt(build_processor(), "what is")
    assert made == "USER: <image> what is ASSISTANT:"
    assert complete_prompt(build_processor(None), r"a <image>\nb") == "a <image>\nb"
    with pytest.raises(DataError, match="no chat template to place it: write <image>"):
        complete_prompt(build_processor(None), "what is")
    with pytest.raises(DataError, match="does not place the picture: write <image>"):
        complete_prompt(build_processor("{{ messages[0]['content'][1]['text'] }}"), "what is")


def test_options_are_read_as_their_method_has_them() -> None:
    method = read_method("holov", None, 4, ["crops=8", "mode=paper-2d", "positions = original"])
    assert method == vistoken.HoloV(keep=4, crops=8, mode="paper-2d", positions="original")
    assert read_method("random", 0.5, None, ["seed=3"]) == vistoken.Random(ratio=0.5, seed=3)
    assert read_method("uniform", None, None, ["keep=7"]) == vistoken.Uniform(keep=7)
    with pytest.raises(MethodError, match="seed must be"):
        read_method("random", 0.5, None, ["seed=true"])


def test_a_device_that_is_not_there_is_refused(photo: Path) -> None:
    wanted = ("prune", "--prompt", "what", "--keep", 4, "--image", photo, "--device")
    refused("no device 'gpu'", *wanted, "gpu")
    if not torch.cuda.is_available():
        refused("finds no GPU for 'cuda:1'", *wanted, "cuda:1")


def test_debug_shows_where_an_error_comes_from(photo: Path) -> None:
    result = run(*PRUNE, "--image", photo, "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("error: ")


def test_a_processor_of_an_older_format_is_completed(checkpoint: Path, tmp_path: Path) -> None:
    """Published LLaVA-1.5 folders have been saved without the fields that count placeholders."""
    folder = tmp_path / "old"
    shutil.copytree(checkpoint, folder)
    path = folder / "processor_config.json"
    saved = json.loads(path.read_text())
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        saved.pop(name)
    path.write_text(json.dumps(saved))
    _, processor = load_model(str(folder), "cpu")
    inputs = processor(images=Image.new("RGB", (50, 50)), text="<image> what", return_tensors="pt")
    assert (inputs["input_ids"] == tiny.IMAGE).sum() == tiny.TOKENS


# --- methods and inspect -------------------------------------------------------------------------


def test_methods_lists_what_there_is() -> None:
    names = [row.name for row in vistoken.list_methods()]
    assert [row["name"] for row in printed_json("methods")] == names
    assert printed_json("methods", "pruning") == printed_json("methods")
    listed = run("methods").stdout
    assert all(re.search(rf"^ *{name} ", listed, re.M) for name in names)


def test_methods_shows_the_options_of_one() -> None:
    shown = printed_json("methods", "show", "holov")
    assert shown == printed_json("methods", "holov")
    assert set(shown["options"]) == set(vistoken.method_class("holov").options())
    assert shown["options"]["crops"]["default"] == 16
    assert shown["options"]["mode"]["choices"] == ["paper", "released", "paper-2d"]
    text = run("methods", "holov").stdout
    assert re.search(r"crops +16 +≥ 1 +number of crops", text)
    assert "arXiv 2510.02912" in text


def test_methods_refuses_unknown_names() -> None:
    refused("no method family 'holow'.*Did you mean 'holov'", "methods", "holow")
    refused("no method 'holow'. Did you mean 'holov'", "methods", "show", "holow")
    refused("Name a method to show", "methods", "show")


def test_inspect_tells_what_the_library_tells(checkpoint: Path) -> None:
    found = vistoken.inspect(tiny.tiny_llava())
    shown = printed_json("inspect", "--model", checkpoint)
    assert shown == json.loads(json.dumps(found.to_dict()))
    assert run("inspect", "--model", checkpoint).stdout.split() == str(found).split()
    refused("no folder 'absent'", "inspect", "--model", "absent")


# --- demo ----------------------------------------------------------------------------------------


def test_demo_writes_pictures_and_a_table(tmp_path: Path) -> None:
    out = tmp_path / "shown"
    said = printed_json("demo", "--out", out, "--questions", 0)
    assert {path.name for path in out.iterdir()} == {Path(file).name for file in said["files"]}
    assert len(said["scenes"]) == 8
    assert Image.open(out / "scenes.png").width > 1000
    assert Image.open(out / "scene.png").size == (336, 336)
    for scene in said["scenes"]:
        dense, pruned = scene["answers"]["all tokens"], scene["answers"][vistoken.DEFAULT_PRUNING]
        assert dense["report"]["tokens_out"] == [576] and pruned["report"]["tokens_out"] == [64]
        assert dense["right"] == (dense["text"] == scene["truth"])
    assert sum(scene["answers"]["all tokens"]["right"] for scene in said["scenes"]) >= 6


def test_demo_refuses_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused("folder .* cannot be made", "demo", "--out", tmp_path / "file")


# --- the program as a whole ----------------------------------------------------------------------


def test_the_module_runs_from_the_repository() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vistoken", "methods", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) and done.stderr == ""


def test_importing_the_commands_loads_no_model_library() -> None:
    code = "import sys, vistoken.commands.main; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"transformers", "PIL", "matplotlib"} & set(done.stdout.split())


def test_version_and_help() -> None:
    assert run("--version").stdout == f"vistoken {vistoken.__version__}\n"
    for command in ("demo", "prune", "methods", "inspect"):
        assert run(command, "--help").exit_code == 0
        assert command in run("--help").stdout
