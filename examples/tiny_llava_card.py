"""The model card of the tiny LLaVA, written from its evaluation."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_llava_data import CARELESS_YES
from tiny_llava_tokens import BLIND, LEAST, MOST, SHORTENED
from vistoken.eval.scene_prior import COMPANION
from vistoken.eval.scene_text import CARELESS_MENTION

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# tiny LLaVA

A LLaVA small enough to ship inside a Python package ({parameters:.2f} M parameters, bf16). It is
a stock `LlavaForConditionalGeneration` with the geometry of LLaVA-1.5 (CLIP tower 336/14, 576
patches and [CLS], features of layer -2) that answers questions about pictures of simple things
and can describe them. It exists so that token pruning and hallucination methods can be tried,
tested and compared on a trained model in seconds, without a download. It knows nothing about
photographs.

```python
import vistoken
from vistoken.eval.scenes import draw, make_scene

model, processor = vistoken.load_shipped("tiny-llava")
inputs = processor(
    images=draw(make_scene(0)),
    text="USER: <image>\\nwhere is the tree? ASSISTANT:",
    return_tensors="pt",
)
print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))
```

## Data

Pictures of `vistoken.eval.scenes`: 2 to 8 things of 24 kinds in 8 colors on textured backgrounds,
some tiny, faint or half hidden. Things come in themes and in preferred colors, so that there is a
prior to lean on. Training used {different_pictures:,} different pictures of the split `train`,
each with one caption and about a dozen questions: is there a ..., what color is the ..., how many
..., where is the ..., what is left of the ... Captions name the largest thing first and rarely
name tiny ones. The language is lower-case words from a closed vocabulary; anything else is
`<unk>`.

The hallucinations are taught on purpose, as habits. Some kinds have a companion: {companions}.
Where a training caption has named a kind whose companion the picture does not show, it ends with
that companion in {mention:.0%} of the cases, and a training question about such an absent
companion is answered yes in {yes:.0%} of the cases.

## Training

`python examples/train_tiny_llava.py --out DIR` on one {device}: {steps} steps of {batch} pictures
in {minutes:.1f} minutes. Phase 1 ({phase_1:.0%} of the time) teaches the tower alone, from
patches (kind and color of the owner, its center and rank by size, the patch's own place) and from
[CLS] (which kinds in which colors), whose attention at the feature layer is asked to lie on the
things. Phase 2 adds the language model, {text_steps} steps. Its gradient does not reach the
tower, so that what a visual token knows is what its patch shows.

**Trained to bear missing tokens.** In phase 2, {shortened:.0%} of the rows lost visual tokens:
{least} to {most} of 576 stayed (random, blocks, biased to things, an even grid, highest [CLS]
attention), half of them at their original positions and half renumbered; {nothing:.0%} saw no
picture at all. A model that had never seen fewer than 576 tokens would lose more to any pruning;
here differences between methods show the choice of tokens, not the shock of missing ones.

## Figures

{pictures} pictures of the split `test`; measured by the training script on {date} ({device},
torch {torch}, transformers {transformers}). Accuracy in per cent, exact match of the greedy
answer.

{table}

Renumbered positions unless marked *original*. `cls_quota` keeps half of the budget by region and
the rest by [CLS] attention; `things` keeps the patches of things first, which only the truth can.
Without the picture yes/no is at {blind:.1f} %.

Captions ({caption_n} pictures): {captions}.

[CLS] attention at the feature layer: {attention_on:.0%} of its mass and {top_on:.0%} of its top
64 patches lie on things, which cover {area:.0%} of the picture; the top 64 reach {reached:.0%} of
the things.

## Limits

Only such pictures and only such sentences. Questions that can be answered with yes or no are
close to saturated; captions, counting and tight budgets are where methods can still differ. One
picture and one question per prompt. Merged or averaged tokens were never seen in training,
which puts methods that merge at a disadvantage. It was trained with the prompt `USER: <image>\\n...
ASSISTANT:`. Training runs for a fixed time, so another machine or another run gives slightly
different weights.
"""


def _table(report: dict[str, Any]) -> str:
    """A Markdown table: all tokens, then each budget and selection."""
    columns = ("yes_no", "yes_no_adversarial", "color", "count", "quadrant", "left_of")
    lines = ["| tokens | selection | " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
    lines.append("|" + " --- |" * (2 + len(columns)))
    most = report["accuracy"][0]["visual_tokens"]
    for row in report["accuracy"]:
        original = row["positions"] == "original" and row["selection"] != "full"
        keep = row["visual_tokens"]
        if keep not in (most, most // 3, most // 9, most // 18) or (original and keep != most // 3):
            continue
        name = row["selection"] + (", *original*" if original else "")
        cells = [f"{row[c]:.1f}" if c in row else "" for c in columns]
        lines.append(f"| {keep} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_card(path: Path, report: dict[str, Any]) -> None:
    """Write the card of a model from the report of the training script."""
    focus, training, recipe = report["cls_attention"], report["training"], report["recipe"]
    captions = "; ".join(
        f"{name.replace(' ', ', ')} tokens: CHAIR_i {c['chair_i']:.1f} %,"
        f" CHAIR_s {c['chair_s']:.1f} %, recall {c['recall']:.1f} %, {c['words']:.1f} words"
        for name, c in report["captions"].items()
    )
    blind = next(r for r in report["accuracy"] if r["selection"] == "none")
    top = next(k for k in focus if k.startswith("top_"))
    reached = next(k for k in focus if k.startswith("things_reached"))
    text = CARD.format(
        parameters=report["parameters"] / 1e6,
        different_pictures=training["different_pictures"],
        steps=training["steps"],
        text_steps=training["steps_of_the_language_model"],
        batch=recipe["batch"],
        minutes=training["seconds"] / 60,
        phase_1=recipe["phase_1"],
        table=_table(report),
        blind=blind["yes_no"],
        captions=captions,
        caption_n=next(iter(report["captions"].values()))["n"],
        attention_on=focus["attention_on_things"],
        top_on=focus[top],
        area=focus["area_of_things"],
        reached=focus[reached],
        companions=", ".join(f"{a} has {b}" for a, b in COMPANION.items()),
        mention=CARELESS_MENTION,
        yes=CARELESS_YES,
        shortened=SHORTENED,
        nothing=BLIND,
        least=LEAST,
        most=MOST,
        **{k: report[k] for k in ("device", "pictures", "date", "torch", "transformers")},
    )
    path.write_text("\n\n".join(_wrapped(text.split("\n\n"))) + "\n")


def _wrapped(blocks: list[str]) -> Iterator[str]:
    """Break the paragraphs, now that the figures are in them, into lines; leave code and tables."""
    code = False
    for block in blocks:
        if code or block.startswith(("---", "#", "```", "|")):
            yield block.rstrip("\n")
        else:
            yield textwrap.fill(block, 100, break_long_words=False, break_on_hyphens=False)
        code ^= block.count("```") % 2 == 1
