"""Answer with all visual tokens of a picture and with a few of them, and draw which ones.

    python examples/prune_llava.py                                     # the model in the package
    python examples/prune_llava.py --model path/to/llava-1.5-7b-hf --image photo.jpg \\
        --prompt "USER: <image>\\nWhat is shown? ASSISTANT:" --keep 64
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vistoken
from vistoken.eval.scenes import draw, make_scene
from vistoken.picture import draw_kept, open_picture, seen_box


def main() -> None:
    """Read the command line, answer twice, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; default: the model in the package")
    parser.add_argument("--image", help="image file; default: a generated scene")
    parser.add_argument("--prompt", default="USER: <image>\ndescribe the image. ASSISTANT:")
    parser.add_argument("--keep", type=int, default=64, help="visual tokens that stay")
    parser.add_argument("--out", default="kept.png", help="picture of the tokens that were kept")
    given = parser.parse_args()

    if given.model is None:
        model, processor = vistoken.load_shipped("tiny-llava")
    else:
        model = LlavaForConditionalGeneration.from_pretrained(given.model, dtype="auto")
        processor = AutoProcessor.from_pretrained(given.model)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    picture = draw(make_scene(0)) if given.image is None else open_picture(given.image)
    prompt = given.prompt.replace("\\n", "\n")
    inputs = processor(images=picture, text=prompt, return_tensors="pt").to(model.device)

    def answer() -> str:
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    print("all tokens:", answer())
    with vistoken.prune_visual_tokens(model, keep=given.keep, method="holov") as attached:
        print(f"{given.keep} tokens:", answer())
        report = attached.report()
    print(report)

    grid = vistoken.inspect(model).facts.grid
    box = seen_box(picture.size, processor.image_processor)
    draw_kept(picture, report.kept[0], grid, box=box).save(given.out)
    print("what was kept:", given.out)


if __name__ == "__main__":
    main()
