"""Pictures and packed texts for `train_tiny_llava.py`, made by worker processes when needed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vistoken.eval.scene_prior import COLORS, COMPANION, KINDS
from vistoken.eval.scene_text import DESCRIBE, NEGATIVES, SUFFIXES
from vistoken.eval.scenes import (
    SIZE,
    TASKS,
    Scene,
    caption,
    draw,
    make_scene,
    order,
    owner_grid,
    questions,
    truth,
)

# From habit, people say yes when asked for the companion of something they saw.
CARELESS_YES = 0.3


@dataclass
class Batch:
    """B pictures with truth about patches and packed text of T tokens.

    images uint8 [B, 336, 336, 3]; owner [B, N] index into `things`, -1 background; things
    [B, 8, 5] (kind, color, center row, center column, rank by size), -1 where there is none; ids,
    targets (-100: no loss), segment (0: padding, 1: caption) and step (position within its
    segment), all [B, T].
    """

    images: Tensor
    owner: Tensor
    things: Tensor
    ids: Tensor
    targets: Tensor
    segment: Tensor
    step: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor."""
        return Batch(*(function(getattr(self, f.name)) for f in fields(self)))

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device without waiting for it."""
        return self.map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by the data loader so that copies to the device run beside the computation."""
        return self.map(lambda t: t.pin_memory())


Segment = tuple[str, str]


def pack(
    encode: Encoder, texts: Sequence[Sequence[Segment]], length: int | None = None
) -> dict[str, Tensor]:
    """Pack (question, answer) segments row by row; a segment that does not fit is left out.

    Without `length` the rows are as long as the longest. The target of a position is the token
    after it, where that one belongs to the answer (its <eos> included).
    """
    rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
    for segments in texts:
        ids: list[int] = []
        targets: list[int] = []
        whose: list[int] = []
        step: list[int] = []
        for i, (question, answer) in enumerate(segments):
            ask, say = encode(f"{question} ASSISTANT:"), [*encode(answer), encode.eos]
            if length is not None and len(ids) + len(ask) + len(say) > length:
                continue
            ids += ask + say
            targets += [-100] * (len(ask) - 1) + say + [-100]
            whose += [i + 1] * (len(ask) + len(say))
            step += range(len(ask) + len(say))
        rows.append((ids, targets, whose, step))
    width = length or max(len(ids) for ids, *_ in rows)
    names, fill = ("ids", "targets", "segment", "step"), (0, -100, 0, 0)
    return {
        name: torch.tensor([row[j] + [fill[j]] * (width - len(row[j])) for row in rows])
        for j, name in enumerate(names)
    }


class Encoder:
    """Words to ids by table look-up: the same as the tokenizer, and cheap to send to workers."""

    def __init__(self, table: dict[str, int]) -> None:
        self.table = table
        self.eos = table["<eos>"]
        self.start = [table["<bos>"], table["user"], table[":"]]

    def __call__(self, text: str) -> list[int]:
        for mark in "?:.,":
            text = text.replace(mark, f" {mark} ")
        return [self.table[w] for w in text.lower().split()]


def training_text(scene: Scene, rng: random.Random) -> list[Segment]:
    """One caption and a dozen questions about a scene, in the words of the usual benchmarks."""
    segments = [(rng.choice(DESCRIBE), caption(scene, careless=True))]
    asked: list[Segment] = []
    expected = {COMPANION[k] for k in truth(scene) if k in COMPANION}
    for seed in rng.sample(range(10**6), 2):
        negatives = rng.choice(NEGATIVES)
        for q in questions(scene, tasks=TASKS, negatives=negatives, seed=seed):
            text, answer = q.text, q.answer
            if q.task == "exists":
                habit = answer == "no" and q.about in expected
                answer = "yes" if habit and rng.random() < CARELESS_YES else answer
            if rng.random() < 0.15:
                last = len(SUFFIXES) if q.task == "exists" else 2
                text = f"{text} {SUFFIXES[rng.randrange(last)]}"
            if (text, answer) not in asked:
                asked.append((text, answer))
    rng.shuffle(asked)
    return segments + asked


def scene_truth(scenes: Sequence[Scene], grid: int) -> dict[str, Tensor]:
    """`owner` and `things` of `Batch`."""
    owner = np.stack([owner_grid(s, grid).ravel() for s in scenes]).astype(np.int8)
    things = np.full((len(scenes), 8, 5), -1, dtype=np.int64)
    for i, scene in enumerate(scenes):
        rank = {id(t): r for r, t in enumerate(order(scene))}
        for j, t in enumerate(scene.things):
            row, column = (int(c * grid / SIZE) for c in (t.center[1], t.center[0]))
            labels = (KINDS.index(t.kind), COLORS.index(t.color), row, column, rank[id(t)])
            things[i, j] = labels
    return {"owner": torch.from_numpy(owner), "things": torch.from_numpy(things)}


def pictures(scenes: Iterable[Scene]) -> Tensor:
    """Paint scenes: uint8 [B, 336, 336, 3]."""
    return torch.from_numpy(np.stack([np.asarray(draw(s)) for s in scenes]))


class TrainingBatches(Dataset[Batch]):
    """Batch number i holds training scenes i * size ... (i + 1) * size - 1, whoever makes it."""

    def __init__(self, encode: Encoder, size: int, grid: int, length: int, seed: int) -> None:
        self.encode, self.size, self.grid = encode, size, grid
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return 10_000_000 // self.size

    def __getitem__(self, index: int) -> Batch:
        first = index * self.size
        scenes = [make_scene(i, "train", self.seed) for i in range(first, first + self.size)]
        rng = random.Random(f"training text {self.seed} {index}")
        packed = pack(self.encode, [training_text(s, rng) for s in scenes], self.length)
        return Batch(images=pictures(scenes), **scene_truth(scenes, self.grid), **packed)


class From(torch.utils.data.Sampler[int]):
    """Batch numbers from `first` on, in order."""

    def __init__(self, first: int, stop: int) -> None:
        self.first, self.stop = first, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.stop))

    def __len__(self) -> int:
        return self.stop - self.first
