"""How good the tiny LLaVA is: all kinds of questions and captions, with all tokens and few."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tiny_llava_data import Encoder, Segment, pack, pictures, scene_truth
from tiny_llava_model import see, text_states
from tiny_llava_tokens import concentration, evaluation_subset, spread_order
from vistoken.eval.scene_text import DESCRIBE, NEGATIVES
from vistoken.eval.scenes import Scene, caption, make_scenes, mentioned, questions, truth

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BUDGETS = (192, 128, 64, 32)
WAYS = ("random", "uniform", "cls_topk", "cls_quota", "things")


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 336, 336, 3] to what CLIP's processor gives: float [B, 3, 336, 336]."""
    x = images.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 on a GPU, float32 on a CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def exam(scenes: Sequence[Scene]) -> tuple[list[list[Segment]], list[list[str]]]:
    """The questions on every scene with a label for each: the task, and for yes/no its half."""
    texts: list[list[Segment]] = []
    labels: list[list[str]] = []
    for scene in scenes:
        said: dict[tuple[str, str], str] = {}
        for negatives in NEGATIVES:
            for q in questions(scene, tasks=("exists",), negatives=negatives, pairs=3):
                label = "yes" if q.answer == "yes" else f"no {negatives}"
                said.setdefault((q.text, label), q.answer)
        for q in questions(scene, tasks=("color", "count", "quadrant", "left_of")):
            said.setdefault((q.text, q.task), q.answer)
        texts.append([(text, answer) for (text, _), answer in said.items()])
        labels.append([label for _, label in said])
    return texts, labels


def scores(right: dict[str, list[bool]]) -> dict[str, Any]:
    """Accuracies in per cent; a yes/no split weighs its questions with yes and with no equally."""
    percent = {k: 100 * sum(v) / len(v) for k, v in right.items() if v}
    out: dict[str, Any] = {}
    for negatives in NEGATIVES:
        out[f"yes_no_{negatives}"] = (percent["yes"] + percent[f"no {negatives}"]) / 2
    out["yes_no"] = sum(out[f"yes_no_{n}"] for n in NEGATIVES) / len(NEGATIVES)
    out["right_when_yes"] = percent["yes"]
    for negatives in NEGATIVES:
        out[f"right_when_no_{negatives}"] = percent[f"no {negatives}"]
    out |= {t: percent[t] for t in ("color", "count", "quadrant", "left_of") if t in percent}
    return {k: round(v, 2) for k, v in out.items()}


@torch.inference_mode()
def evaluate(
    model: LlavaForConditionalGeneration,
    encode: Encoder,
    *,
    count: int = 1000,
    seed: int = 0,
    grid: int = 24,
    size: int = 100,
    captions: int = 1000,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Examine the model on `count` test scenes: a dictionary ready for JSON.

    An answer is right when every token of it, its end included, is the most likely one: exactly
    when greedy decoding would give it. Subsets are drawn after the tower, as pruning does, with
    the kept tokens at their original and at renumbered positions.
    """
    device = torch.device(device)
    model.eval()
    n, spread = grid * grid, spread_order(grid)
    start = torch.tensor(encode.start, device=device)
    budgets = [b * n // 576 for b in BUDGETS]
    conditions: list[tuple[str, int, bool]] = [("full", n, False), ("none", 0, True)]
    conditions += [(w, b, r) for b in budgets for w in WAYS for r in (True, False)]
    right: dict[tuple[str, int, bool], dict[str, list[bool]]] = {
        c: {k: [] for k in _labels()} for c in conditions
    }
    focus: list[dict[str, float]] = []
    said: dict[str, list[tuple[Scene, str]]] = {}
    for first in range(0, count, size):
        scenes = make_scenes(min(size, count - first), "test", seed, start=first)
        texts, labels = exam(scenes)
        packed = {k: v.to(device) for k, v in pack(encode, texts).items()}
        owner = scene_truth(scenes, grid)["owner"].to(device)
        with autocast(device):
            seen = see(model, normalise(pictures(scenes).to(device)))
        focus.append(concentration(seen.attention, owner, budgets[2]))
        for condition in conditions:
            name, keep, renumber = condition
            kept = _subset(name, keep, seen.attention, owner, spread, seed + first)
            with autocast(device):
                logits = text_states(
                    model, seen.features, start, packed["ids"], packed["segment"], packed["step"],
                    keep=kept, renumber=torch.full((len(scenes),), renumber, device=device),
                )  # fmt: skip
            for marks, row in zip(_marks(logits, packed), labels, strict=True):
                for label, good in zip(row, marks, strict=True):
                    right[condition][label].append(good)
        if first < captions:
            for name, keep in (("full", n), ("cls_quota", budgets[2]), ("random", budgets[2])):
                kept = _subset(name, keep, seen.attention, owner, spread, seed + first)
                features = seen.features[kept].view(len(scenes), keep, -1)
                with autocast(device):
                    texts_said = describe(model, features, start, encode)
                key = f"{name} {keep}"
                said.setdefault(key, []).extend(zip(scenes, texts_said, strict=True))
    accuracy = [
        {
            "selection": name,
            "visual_tokens": keep,
            "positions": "renumbered" if renumber else "original",
            **scores(right[name, keep, renumber]),
        }
        for name, keep, renumber in conditions
    ]
    return {
        "pictures": count,
        "questions": {k: len(v) for k, v in right["full", n, False].items()},
        "accuracy": accuracy,
        "captions": {k: chair(v) for k, v in said.items()},
        "reference_captions": chair([(s, caption(s)) for s, _ in said[f"full {n}"]]),
        "cls_attention": {k: round(sum(f[k] for f in focus) / len(focus), 4) for k in focus[0]},
        "examples": [t for _, t in said[f"full {n}"][:8]],
    }


def _labels() -> list[str]:
    return ["yes", *(f"no {n}" for n in NEGATIVES), "color", "count", "quadrant", "left_of"]


def _subset(
    name: str, keep: int, attention: Tensor, owner: Tensor, spread: Tensor, seed: int
) -> Tensor:
    if name == "full":
        return torch.ones_like(attention, dtype=torch.bool)
    if name == "none":
        return torch.zeros_like(attention, dtype=torch.bool)
    return evaluation_subset(name, keep, attention, owner, spread, seed)


def _marks(logits: Tensor, packed: dict[str, Tensor]) -> list[list[bool]]:
    """For every row and segment, whether each token of the answer is the most likely one."""
    targets, segment = packed["targets"], packed["segment"]
    wrong = ((logits.argmax(dim=-1) != targets) & (targets != -100)).long()
    most = int(segment.max())
    errors = torch.zeros(len(targets), most + 1, dtype=torch.long, device=targets.device)
    errors.scatter_add_(1, segment, wrong)
    there = segment.amax(dim=1).tolist()
    return [
        [e == 0 for e in row[1 : last + 1]]
        for row, last in zip(errors.tolist(), there, strict=True)
    ]


def describe(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    start: Tensor,
    encode: Encoder,
    *,
    prompt: str = DESCRIBE[0],
    longest: int = 64,
) -> list[str]:
    """Greedy captions from the visual tokens given [B, k, C], at renumbered positions."""
    words = {i: w for w, i in encode.table.items()}
    b, device = len(features), features.device
    ids = torch.tensor(encode(f"{prompt} ASSISTANT:"), device=device).expand(b, -1)
    begin, done = ids.shape[1], torch.zeros(b, dtype=torch.bool, device=device)
    for _ in range(longest):
        step = torch.arange(ids.shape[1], device=device).expand(b, -1)
        logits = text_states(model, features, start, ids, torch.ones_like(ids), step)
        following = logits[:, -1].argmax(dim=-1).masked_fill(done, encode.eos)
        ids = torch.cat([ids, following[:, None]], dim=1)
        done = done | (following == encode.eos)
        if bool(done.all()):
            break
    out = []
    for row in ids[:, begin:].tolist():
        row = row[: row.index(encode.eos)] if encode.eos in row else row
        out.append(" ".join(words[i] for i in row).replace(" ,", ",").replace(" .", "."))
    return out


def chair(pairs: Sequence[tuple[Scene, str]]) -> dict[str, float]:
    """CHAIR over captions in per cent, with recall, mean length in words, and correct colors."""
    mentions = hallucinated = bad = found = there = colored = good = 0
    for scene, text in pairs:
        kinds, real = mentioned(text), truth(scene)
        wrong = [k for k in kinds if k not in real]
        mentions += len(kinds)
        hallucinated += len(wrong)
        bad += bool(wrong)
        found += len(set(kinds) & real)
        there += len(real)
        words = text.replace(",", "").replace(".", "").split()
        things = {(t.color, t.kind) for t in scene.things}
        for before, kind in zip(words, words[1:], strict=False):
            if kind in real:
                colored += 1
                good += (before, kind) in things
    return {
        "n": len(pairs),
        "chair_s": round(100 * bad / len(pairs), 2),
        "chair_i": round(100 * hallucinated / max(mentions, 1), 2),
        "recall": round(100 * found / there, 2),
        "mentions": round(mentions / len(pairs), 2),
        "words": round(sum(len(t.split()) for _, t in pairs) / len(pairs), 2),
        "colors_right": round(100 * good / max(colored, 1), 2),
    }
