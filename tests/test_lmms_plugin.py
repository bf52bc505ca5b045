"""The lmms-eval plug-in, through lmms-eval itself on a local task of 20 questions.

Everything that needs lmms-eval is skipped where it is not installed: `pip install
'vistoken[lmms]'` into an environment of its own (it pins many packages), then run this file there.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vistoken
from tiny import batch, one_image, prompt, tiny_llava
from vistoken.errors import BackendUnavailable, DataError, MethodError
from vistoken.eval import lmms_eval_plugin as plugin

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "vistoken" / "shipped_models" / "tiny-llava"
ENTRY_POINT = 'vistoken = "vistoken.eval.lmms_eval_plugin:manifests"'
HAS_LMMS = importlib.util.find_spec("lmms_eval") is not None
needs_lmms = pytest.mark.skipif(
    not HAS_LMMS, reason="lmms-eval is not installed: pip install 'vistoken[lmms]'"
)
WHERE = {"pretrained": str(SHIPPED), "device_map": "cpu", "dtype": "float32"}
ITEMS = 20
TASK = "vistoken_local_scenes"
NEUTRAL = "method=uniform,keep=576"

# --- model arguments (no lmms-eval) --------------------------------------------------------------

TAKEN = ("pretrained", "device", "batch_size", "dtype")


def test_options_of_the_method_are_split_from_those_of_the_adapter() -> None:
    given = {"pretrained": "x", "method": "holov", "keep": 64, "crops": 4, "device": "cpu"}
    methods, rest = plugin.split_arguments(given, TAKEN)
    assert methods == (vistoken.method_class("holov")(keep=64, crops=4),)
    assert rest == {"pretrained": "x", "device": "cpu"}
    assert given["method"] == "holov"  # the caller's mapping is left alone


def test_a_recipe_file_and_no_method(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"methods": [{"name": "random", "ratio": 0.5, "seed": 3}]}))
    methods, rest = plugin.split_arguments({"recipe": str(recipe), "dtype": "auto"}, TAKEN)
    assert [method.to_dict()["seed"] for method in methods] == [3]
    assert rest == {"dtype": "auto"}
    assert plugin.split_arguments({"method": "none"}, TAKEN) == ((), {})


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, MethodError, "exactly one of method=NAME"),
        ({"method": "holov", "recipe": "x.json", "keep": 3}, MethodError, "exactly one"),
        ({"method": "holow", "keep": 3}, MethodError, "Did you mean 'holov'"),
        ({"method": "holov", "kep": 3}, MethodError, "Did you mean 'keep'"),
        ({"method": "holov", "keep": "many"}, MethodError, "keep must be"),
        ({"method": "holov"}, MethodError, "ratio"),
        ({"method": "none", "keep": 3}, MethodError, "no model argument 'keep'"),
        ({"method": "holov", "keep": 3, "devise": "cpu"}, MethodError, "Did you mean 'device'"),
        ({"recipe": "nowhere.json"}, DataError, "nowhere.json"),
        ({"recipe": "x.json", "method": "none"}, MethodError, "exactly one"),
    ],
)
def test_bad_arguments_are_refused(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        plugin.split_arguments(given, TAKEN)


def test_an_option_that_is_also_the_adapters_is_refused() -> None:
    with pytest.raises(MethodError, match="recipe=FILE"):
        plugin.split_arguments({"method": "random", "keep": 3}, (*TAKEN, "seed"))


def test_the_project_registers_the_plugin() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    group = lines.index('[project.entry-points."lmms_eval.models"]')
    assert lines[group + 1] == ENTRY_POINT


@pytest.mark.skipif(HAS_LMMS, reason="lmms-eval is installed")
def test_without_lmms_eval_the_error_says_what_to_install() -> None:
    for ask in (plugin.manifests, lambda: plugin.LlavaChat):
        with pytest.raises(BackendUnavailable, match=r"pip install 'vistoken\[lmms\]'"):
            ask()


def test_other_names_are_unknown() -> None:
    assert not hasattr(plugin, "LlavaVideo")


# --- what an answer must be (no lmms-eval) -------------------------------------------------------


class Heard:
    """A cache hook that remembers."""

    def __init__(self) -> None:
        self.answers: list[Any] = []

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.answers.append(answer)


@pytest.mark.parametrize("answer", ["", "  \n", SimpleNamespace(text="")])
def test_an_empty_answer_stops_the_run(answer: Any) -> None:
    heard = Heard()
    with pytest.raises(plugin.EvaluationFailed, match="allow_empty=true"):
        plugin.Tally(hook=heard).add_partial("generate_until", (), answer)
    assert not heard.answers
    allowing = plugin.Tally(allow_empty=True, hook=heard)
    allowing.add_partial("generate_until", (), answer)
    assert heard.answers == [answer] and allowing.items == 1


def test_an_attachment_must_have_seen_a_picture() -> None:
    model = tiny_llava()
    with vistoken.prune_visual_tokens(model, keep=9, method="uniform") as attachment:
        tally = plugin.Tally(attachment, hook=Heard())
        with pytest.raises(plugin.EvaluationFailed, match="recorded no call"):
            tally.add_partial("generate_until", (), "yes")
        model.generate(**batch(prompt(4)), max_new_tokens=1)
        tally.add_partial("generate_until", (), "yes")
        with pytest.raises(plugin.EvaluationFailed, match="seen no picture in 2 items"):
            tally.check_attached()
        model.generate(**one_image(), max_new_tokens=1)
        tally.add_partial("generate_until", (), "yes")
        tally.check_attached()
        assert (tally.images, tally.tokens_in, tally.tokens_out) == (1, 36, 9)
    with pytest.raises(plugin.EvaluationFailed, match="taken off"):
        tally.add_partial("generate_until", (), "yes")


# --- lmms-eval -----------------------------------------------------------------------------------

UTILS = """
def to_visual(doc):
    return [doc["image"].convert("RGB")]


def to_text(doc):
    return doc["question"]


def results(doc, answers):
    return {"exact": float(answers[0].strip() == doc["answer"])}


def mean(values):
    return sum(values) / len(values)
"""
YAML = """
task: {task}
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: generate_until
doc_to_visual: !function utils.to_visual
doc_to_text: !function utils.to_text
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
process_results: !function utils.results
metric_list:
  - metric: exact
    aggregation: !function utils.mean
    higher_is_better: true
metadata:
  - version: 0.0
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of lmms-eval over 20 questions of the scene data set, with its data."""
    import datasets

    from vistoken.eval.scenes import draw, make_scene, questions

    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for index in range(ITEMS):
        scene = make_scene(index)
        asked = questions(scene)[index % 3]
        rows.append({"image": draw(scene), "question": asked.text, "answer": asked.answer})
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    kinds = {key: datasets.Value("string") for key in ("question", "answer")}
    features = datasets.Features({"image": datasets.Image(), **kinds})
    data = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"test": data}).save_to_disk(str(folder / "data"))
    (folder / "utils.py").write_text(UTILS)
    (folder / "task.yaml").write_text(YAML.format(task=TASK, data=folder / "data"))
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `sys.path`: metadata of a distribution with the entry point of the plug-in."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "vistoken_test_entry-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vistoken-test-entry\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[lmms_eval.models]\n" + ENTRY_POINT.replace('"', "") + "\n"
    )
    return folder


@pytest.fixture(scope="module")
def registry(installed: Path) -> Iterator[Any]:
    """lmms-eval's model registry after it has read the entry point."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(installed))
        from lmms_eval.models import MODEL_REGISTRY_V2

        MODEL_REGISTRY_V2.load_entrypoint_manifests(overwrite=True)
        yield MODEL_REGISTRY_V2


@pytest.fixture
def evaluate(registry: Any, task_folder: Path) -> Any:
    """Run the task with an adapter, given by its id or as an instance; returns the raw answers."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    def run(model: Any, more: str = "", **settings: Any) -> list[str]:
        result = simple_evaluate(
            model=model,
            model_args=",".join(
                [f"{key}={value}" for key, value in WHERE.items()] + [more] * bool(more)
            ),
            tasks=[TASK],
            batch_size=1,
            device="cpu",
            task_manager=TaskManager("ERROR", include_path=str(task_folder)),
            bootstrap_iters=0,
            **settings,
        )
        samples = sorted(result["samples"][TASK], key=lambda sample: sample["doc_id"])
        assert all(len(sample["resps"]) == 1 for sample in samples)
        return [sample["resps"][0][0] for sample in samples]

    return run


@pytest.fixture
def adapter(registry: Any) -> Any:
    """Make an adapter with a recipe, as lmms-eval would."""

    def make(name: str = "LlavaChat", **given: Any) -> Any:
        return getattr(plugin, name)(**WHERE, device="cpu", batch_size=1, **given)

    return make


RESOLVE = """
import sys
from lmms_eval.models import get_model_manifest
from importlib.metadata import entry_points
print(get_model_manifest("vistoken_llava"))
print(sorted({"torch", "transformers", "accelerate"} & set(sys.modules)))
"""


@needs_lmms
def test_the_entry_point_resolves_without_torch(installed: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{installed}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    llava, loaded = done.stdout.splitlines()[-2:]
    assert "lmms_eval_plugin.LlavaSimple" in llava and "lmms_eval_plugin.LlavaChat" in llava
    assert loaded == "[]"


@needs_lmms
def test_the_registry_accepts_the_classes(registry: Any) -> None:
    """lmms-eval checks the base class, and that `is_simple` fits the slot."""
    chat = registry.get_model_class("vistoken_llava")
    simple = registry.get_model_class("vistoken_llava", force_simple=True)
    assert (chat.is_simple, simple.is_simple) == (False, True)
    assert chat is plugin.LlavaChat and chat.__module__ == plugin.__name__


@needs_lmms
@pytest.mark.parametrize("force_simple", [False, True], ids=["chat", "simple"])
def test_neutral_and_bare_runs_are_the_stock_adapter(evaluate: Any, force_simple: bool) -> None:
    expected = evaluate("llava_hf", force_simple=force_simple)
    assert len(expected) == ITEMS and len(set(map(str, expected))) > 3
    assert evaluate("vistoken_llava", NEUTRAL, force_simple=force_simple) == expected
    if not force_simple:
        assert evaluate("vistoken_llava", "method=none", limit=3) == expected[:3]


@needs_lmms
def test_a_recipe_prunes_and_the_model_is_released(
    evaluate: Any, adapter: Any, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"methods": [{"name": "holov", "keep": 4}]}))
    model = adapter(recipe=str(recipe))
    edited = weakref.ref(model.model)
    answers = evaluate(model, limit=4)
    tally = model.tally
    assert (tally.items, tally.images) == (4, 4)
    assert (tally.tokens_in, tally.tokens_out) == (4 * 576, 4 * 4)
    assert str(tally) == "4 items, visual tokens per picture 576.0 -> 4.0"
    assert answers == evaluate("vistoken_llava", "method=holov,keep=4", limit=4)
    assert answers != evaluate("vistoken_llava", "method=none", limit=4)
    gc.collect()
    assert model.attachment is None and edited() is None


@needs_lmms
def test_bad_arguments_fail_before_a_model_is_loaded(evaluate: Any) -> None:
    with pytest.raises(MethodError, match="Did you mean 'keep'"):
        evaluate("vistoken_llava", "method=holov,kep=64")


def broken(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("broken on purpose")


@needs_lmms
@pytest.mark.parametrize("name", ["LlavaChat", "LlavaSimple"])
def test_an_exception_in_a_method_fails_the_run(
    evaluate: Any, adapter: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("vistoken.pruning.uniform.Uniform.select", broken)
    with pytest.raises(plugin.EvaluationFailed, match="broken on purpose") as caught:
        evaluate(adapter(name, method="uniform", keep=9), limit=3)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@needs_lmms
def test_the_stock_adapter_scores_a_broken_method(
    evaluate: Any, registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the plug-in is strict: this run gives scores, and nothing tells that it was broken."""

    monkeypatch.setattr("vistoken.pruning.uniform.Uniform.select", broken)
    stock = registry.get_model_class("llava_hf")(**WHERE, device="cpu", batch_size=1)
    vistoken.prune_visual_tokens(stock.model, keep=9, method="uniform")
    assert evaluate(stock, limit=2) == ["", ""]


@needs_lmms
def test_a_method_that_sees_no_call_fails_the_run(
    evaluate: Any, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = vistoken.attach
    monkeypatch.setattr(vistoken, "attach", lambda model, m: attach(copy.deepcopy(model), m))
    with pytest.raises(plugin.EvaluationFailed, match="recorded no call"):
        evaluate(adapter(method="uniform", keep=9), limit=2)


@needs_lmms
def test_empty_answers_fail_the_run_unless_allowed(evaluate: Any, adapter: Any) -> None:
    def mute(**given: Any) -> Any:
        model = adapter(method="uniform", keep=9, **given)
        model.model.lm_head.weight.data.zero_()  # the first token wins, which is padding
        return model

    with pytest.raises(plugin.EvaluationFailed, match="empty answer"):
        evaluate(mute(), limit=2)
    assert evaluate(mute(allow_empty=True), limit=2) == ["", ""]


@needs_lmms
def test_loglikelihood_is_refused_on_a_pruned_prompt(adapter: Any) -> None:
    with pytest.raises(plugin.EvaluationFailed, match="generate_until"):
        adapter(method="uniform", keep=9).loglikelihood([])
    assert adapter(method="none").loglikelihood([]) == []
