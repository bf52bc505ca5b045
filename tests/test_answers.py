"""Answers from a shared prefix are those of one `generate` for each question."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
import vistoken
from vistoken.errors import DataError
from vistoken.eval.answers import (
    Exam,
    answer,
    answer_ids,
    common_prefix,
    generate_answers,
    pad_left,
    prepare,
    shares_prefix,
)

pytest.importorskip("transformers")
LIMIT = 8


def sharp_llava() -> Any:
    """A tiny model whose attention is sharp, so that a position off by one changes the answer."""
    model = tiny.tiny_llava()
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.data *= 8
    return model


def exam(counts: tuple[int, ...] = (3, 1, 4), *, before: int = 3) -> Exam:
    """Questions of 1 to 9 tokens behind a common start; `counts[i]` of them about picture i."""
    start = tiny.prompt(before, "image", 2)
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for count in counts:
        rows = []
        for _ in range(count):
            length = int(torch.randint(1, 10, (1,), generator=generator))
            words = torch.randint(4, 64, (length,), generator=generator).tolist()
            rows.append((*start, *words))
        prompts.append(tuple(rows))
    return Exam(tiny.pictures(len(counts)), tuple(prompts))


@torch.no_grad()
def one_by_one(model: Any, asked: Exam) -> list[list[tuple[tuple[int, ...], torch.Tensor]]]:
    """Every question by itself, unpadded, through `generate`."""
    stop = model.generation_config.eos_token_id
    stops = [stop] if isinstance(stop, int) else stop
    found = []
    for pixels, prompts in zip(asked.pixel_values, asked.prompts, strict=True):
        row = []
        for ids in prompts:
            out = model.generate(
                input_ids=torch.tensor([ids]),
                pixel_values=pixels[None],
                max_new_tokens=LIMIT,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            new = out.sequences[0, len(ids) :].tolist()
            end = next((i for i, token in enumerate(new) if token in stops), len(new))
            row.append((tuple(new[:end]), out.logits[0][0]))
        found.append(row)
    return found


def agree(model: Any, asked: Exam, batch: int = 2) -> None:
    wanted = one_by_one(model, asked)
    given = answer_ids(model, asked, max_new_tokens=LIMIT, batch=batch)
    assert [[a.ids for a in row] for row in given] == [[ids for ids, _ in row] for row in wanted]
    for mine, theirs in zip(given, wanted, strict=True):
        for one, (_, logits) in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one.first_logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_dense_answers(batch: int) -> None:
    agree(sharp_llava(), exam(), batch)


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("method", vistoken.method_names("pruning"))
def test_pruned_answers(method: str, positions: str) -> None:
    model = sharp_llava()
    bare = answer_ids(model, exam(), max_new_tokens=LIMIT)
    options = {"crops": 4} if method == "holov" else {}
    with vistoken.prune_visual_tokens(model, keep=9, method=method, positions=positions, **options):
        agree(model, exam())
        pruned = answer_ids(model, exam(), max_new_tokens=LIMIT)
    changed = [
        not torch.allclose(a.first_logits, b.first_logits, atol=1e-3)
        for one, two in zip(bare, pruned, strict=True)
        for a, b in zip(one, two, strict=True)
    ]
    assert any(changed)  # the method did act


def test_answers_end_at_any_of_several_stops() -> None:
    model = sharp_llava()
    said = [a.ids for row in answer_ids(model, exam(), max_new_tokens=LIMIT) for a in row]
    stops = sorted({ids[2] for ids in said})[:2]
    model.generation_config.eos_token_id = stops
    agree(model, exam())
    short = [a.ids for row in answer_ids(model, exam(), max_new_tokens=LIMIT) for a in row]
    assert {len(ids) for ids in short} != {LIMIT}
    assert not any(token in stops for ids in short for token in ids)


def test_without_a_stop_every_answer_is_full() -> None:
    model = sharp_llava()
    model.generation_config.eos_token_id = None
    given = answer_ids(model, exam(), max_new_tokens=LIMIT)
    assert {len(a.ids) for row in given for a in row} == {LIMIT}


class Generates:
    """Counts the calls of a model's `generate`."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        inner = type(model).generate

        def counted(this: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return inner(this, *args, **kwargs)

        monkeypatch.setattr(type(model), "generate", counted)


def test_a_picture_behind_the_question_goes_through_generate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = sharp_llava()
    prompts = tuple((tuple(tiny.prompt(4, "image", 3, seed=seed)),) * 2 for seed in (1, 2))
    asked = Exam(tiny.pictures(2), prompts)
    assert common_prefix(prompts) < 1 + 4 + tiny.TOKENS
    agree(model, asked)
    counted = Generates(model, monkeypatch)
    answer_ids(model, asked, max_new_tokens=LIMIT)
    assert counted.calls == 1  # one call for all prompts about the pictures of a batch
    answer_ids(model, asked, max_new_tokens=LIMIT, batch=1)  # alone, each has its own prefix
    assert counted.calls == 1


def test_settings_that_change_greedy_tokens_go_through_generate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = sharp_llava()
    assert shares_prefix(model)
    model.generation_config.repetition_penalty = 50.0
    assert not shares_prefix(model)
    agree(model, exam())
    counted = Generates(model, monkeypatch)
    answer_ids(model, exam(), max_new_tokens=LIMIT, batch=1)
    assert counted.calls == len(exam().prompts) > 1


def test_progress_counts_every_question() -> None:
    seen: list[int] = []
    answer_ids(sharp_llava(), exam(), max_new_tokens=1, batch=2, progress=seen.append)
    assert seen == [4, 4]


def test_padding_and_prefix() -> None:
    ids, mask = pad_left([(5, 6), (7,)], 0, "cpu")
    assert ids.tolist() == [[5, 6], [0, 7]] and mask.tolist() == [[1, 1], [0, 1]]
    assert common_prefix([[(1, 2, 3), (1, 2, 4)], [(1, 2, 3)]]) == 2
    assert common_prefix([[(1, 2, 3)], [(1, 2, 3)]]) == 2  # something is left to be asked
    assert common_prefix([[(1,)]]) == 0


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"batch": 0}])
def test_limits_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match="at least 1"):
        answer_ids(sharp_llava(), exam(), **wrong)


# --- with words: the shipped model ---------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return vistoken.load_shipped("tiny-llava")


def scenes(count: int) -> tuple[list[Any], list[list[str]], list[list[str]]]:
    from vistoken.eval.scenes import draw, make_scenes, questions

    made = make_scenes(count)
    asked = [questions(scene)[: 3 + i] for i, scene in enumerate(made)]
    prompts = [[f"USER: <image>\n{q.text} ASSISTANT:" for q in row] for row in asked]
    return [draw(scene) for scene in made], prompts, [[q.answer for q in row] for row in asked]


def test_prepared_ids_are_the_processors(shipped: tuple[Any, Any]) -> None:
    _, processor = shipped
    pictures, prompts, _ = scenes(2)
    asked = prepare(processor, pictures, prompts)
    assert asked.questions == 7
    for i, (picture, texts) in enumerate(zip(pictures, prompts, strict=True)):
        for text, ids in zip(texts, asked.prompts[i], strict=True):
            wanted = processor(images=picture, text=text, return_tensors="pt")
            assert list(ids) == wanted["input_ids"][0].tolist()
            assert torch.equal(asked.pixel_values[i], wanted["pixel_values"][0])


def test_the_shipped_model_answers_the_same_both_ways(shipped: tuple[Any, Any]) -> None:
    model, processor = shipped
    pictures, prompts, truth = scenes(2)
    asked = prepare(processor, pictures, prompts)
    for keep in (576, 64):
        with vistoken.prune_visual_tokens(model, keep=keep):
            fast = answer(model, processor, asked, max_new_tokens=8)
            assert fast == generate_answers(
                model, processor, pictures, prompts, max_new_tokens=8, batch=4
            )
    right = [
        a == t
        for row, row_t in zip(fast, truth, strict=True)
        for a, t in zip(row, row_t, strict=True)
    ]
    assert sum(right) >= 5  # of 7: these are answers, not noise


def test_bad_exams_are_refused(shipped: tuple[Any, Any]) -> None:
    _, processor = shipped
    pictures, prompts, _ = scenes(1)
    for texts, words in (
        ([["no picture"]], "<image> exactly once"),
        ([["<image> and <image>"]], "<image> exactly once"),
        ([[]], "list of prompts"),
        (["<image>"], "list of prompts"),
        ([], "have 0 lists"),
        ([*prompts, *prompts], "have 2 lists"),
    ):
        with pytest.raises(DataError, match=words):
            prepare(processor, pictures, texts)  # type: ignore[arg-type]
