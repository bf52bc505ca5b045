"""transformers' image-text-to-text pipeline over an attached model."""

from __future__ import annotations

import pytest

import vistoken

transformers = pytest.importorskip("transformers")


def test_the_pipeline_answers_as_generate_does() -> None:
    from vistoken.eval.scenes import draw, make_scene, questions

    model, processor = vistoken.load_shipped("tiny-llava")
    scene = make_scene(11)
    picture, question = draw(scene), questions(scene, tasks=("color",))[0]
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question.text}]
    messages = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=picture, return_tensors="pt")
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    with vistoken.prune_visual_tokens(model, keep=64) as att:
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        said = pipe(text=messages, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
        assert att.report().tokens_out == [64]
        several = pipe(text=[messages, messages], max_new_tokens=8, return_full_text=False)
    assert said.strip() == processor.decode(new, skip_special_tokens=True).strip()
    assert said.strip() == question.answer
    assert [answer[0]["generated_text"] for answer in several] == [said, said]
