"""Train the tiny LLaVA that ships with vistoken, from scratch, on one GPU in minutes.

    python examples/train_tiny_llava.py --out DIR              # the real thing
    python examples/train_tiny_llava.py --out DIR --smoke      # seconds on a CPU: does it run?
    python examples/train_tiny_llava.py --out DIR --resume     # go on from DIR/checkpoint.pt

Phase 1 teaches the CLIP tower alone: what each patch shows and where, and what the picture holds
([CLS]). Phase 2 goes on with that and teaches the projector and the language model to answer and
to describe from the tower's features. No gradient of the language model reaches the tower: what
the visual tokens know stays where it is in the picture, so dropping tokens loses what they showed.
DIR/model holds the model in transformers' format, DIR/evaluation.json how good it is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.utils.data import DataLoader

import vistoken
from tiny_llava_card import write_card
from tiny_llava_data import Batch, Encoder, From, TrainingBatches
from tiny_llava_eval import autocast, evaluate, normalise
from tiny_llava_model import (
    TEACHER_WEIGHTS,
    Sizes,
    Teacher,
    build_model,
    build_processor,
    see,
    text_states,
    vision_parts,
)
from tiny_llava_tokens import spread_order, training_subsets


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result. `minutes` and `steps` both end training; 0: no limit."""

    sizes: Sizes = field(default_factory=Sizes)
    minutes: float = 7.6
    steps: int = 0
    phase_1: float = 0.27  # share of the time that the tower has for itself
    batch: int = 128
    reuse: int = 2  # steps for each fresh batch; the others draw from the last `pool` batches
    pool: int = 64
    length: int = 189  # text tokens of a row: with the prefix, 768 positions
    tower_rate: float = 1.2e-3
    text_rate: float = 1.5e-3
    warm: int = 150
    decay: float = 0.02
    seed: int = 0
    test_pictures: int = 1000
    workers: int = 0
    log_seconds: float = 10.0  # between two lines of losses; 0: a line for every step


REAL = Recipe()
SMOKE = Recipe(
    sizes=Sizes(hidden=48, heads=3, tower_layers=3, text_layers=2, text_inner=96, patch=56),
    minutes=0.0,
    steps=40,
    batch=4,
    pool=4,
    length=96,
    warm=5,
    tower_rate=3e-3,
    text_rate=5e-3,
    test_pictures=3,
    log_seconds=0.0,
)


class Trainer:
    """Model, optimizer, pictures and clock of one training run."""

    def __init__(self, recipe: Recipe, out: Path, *, resume: bool, compile_layers: bool) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.out = recipe, out
        self.console = Console(soft_wrap=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = build_processor(recipe.sizes)
        self.encode = Encoder(dict(self.processor.tokenizer.get_vocab()))
        self.model = build_model(recipe.sizes).to(self.device).train()
        self.teacher = Teacher(recipe.sizes).to(self.device)
        tower = [*vision_parts(self.model).parameters(), *self.teacher.parameters()]
        known = {id(p) for p in tower}
        text = [p for p in self.model.parameters() if id(p) not in known]
        self.optimizer = torch.optim.AdamW(
            [{"params": tower, "name": "tower"}, {"params": text, "name": "text"}],
            lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=recipe.decay,
            fused=self.device.type == "cuda",
        )
        self.parameters = tower + text
        self.step, self.seconds, self.fresh, self.text_steps = 0, 0.0, 0, 0
        self.waited = 0.0  # seconds spent waiting for pictures
        self.history: list[dict[str, float]] = []
        self.spread = spread_order(recipe.sizes.grid)
        self.start = torch.tensor(self.encode.start, device=self.device)
        if resume:
            self._load()
        torch.set_float32_matmul_precision("high")
        if compile_layers:
            # Layer by layer: equal layers share one compilation.
            for layer in vision_parts(self.model).encoder.layers:
                layer.compile(dynamic=False)
            for layer in self.model.model.language_model.layers:
                layer.compile(dynamic=False)

    def progress(self) -> float:
        """How much of the run is over, 0 to 1, by the clock or by steps."""
        by_clock = self.seconds / (60 * self.recipe.minutes) if self.recipe.minutes else 0.0
        by_step = self.step / self.recipe.steps if self.recipe.steps else 0.0
        return max(by_clock, by_step)

    def batches(self) -> Iterator[Batch]:
        """Fresh batches and, between them, batches drawn from the last ones."""
        r = self.recipe
        data = TrainingBatches(self.encode, r.batch, r.sizes.grid, r.length, r.seed)
        loader = DataLoader(
            data,
            batch_size=None,
            sampler=From(self.fresh, len(data)),
            num_workers=r.workers,
            prefetch_factor=3 if r.workers else None,
            pin_memory=self.device.type == "cuda",
        )
        pool: list[Batch] = []
        for batch in loader:
            self.fresh += 1
            batch = batch.to(self.device)
            pool = [*pool[-r.pool + 1 :], batch]
            yield batch
            for _ in range(r.reuse - 1):
                yield self._mix(pool)

    def _mix(self, pool: list[Batch]) -> Batch:
        """A batch of rows from everywhere in the pool: equal shares of a few random batches."""
        share = 1 << (min(8, len(pool)).bit_length() - 1)  # a power of two, as batches are
        chosen = [pool[i] for i in torch.randperm(len(pool))[:share].tolist()]
        rows = torch.randperm(self.recipe.batch)[: self.recipe.batch // share].to(self.device)
        return Batch(
            *(torch.cat([getattr(b, f.name)[rows] for b in chosen]) for f in fields(Batch))
        )

    def rates(self) -> None:
        """Warm up, then fall as a cosine; the language model's clock starts with phase 2."""
        r, p = self.recipe, min(1.0, self.progress())
        later = (p - r.phase_1) / (1 - r.phase_1)
        tower = min(1.0, (self.step + 1) / r.warm) * (0.5 + 0.5 * math.cos(math.pi * p))
        text = min(1.0, (self.text_steps + 1) / r.warm) * (0.5 + 0.5 * math.cos(math.pi * later))
        self.optimizer.param_groups[0]["lr"] = r.tower_rate * max(tower, 0.01)
        self.optimizer.param_groups[1]["lr"] = r.text_rate * max(text, 0.01) if later > 0 else 0.0

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """All losses on one batch; those of the language model in phase 2 only."""
        pixels = augment(normalise(batch.images))
        with autocast(self.device):
            seen = see(self.model, pixels)
            losses = self.teacher(seen, batch)
            if self.progress() >= self.recipe.phase_1:
                keep, renumber = training_subsets(batch, seen.attention.detach(), self.spread)
                logits = text_states(
                    self.model, seen.features.detach(), self.start, batch.ids, batch.segment,
                    batch.step, keep=keep, renumber=renumber,
                )  # fmt: skip
                losses["text"] = text_loss(logits, batch)
        return losses

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the optimizer."""
        self.rates()
        losses = self.losses(batch)
        total = torch.stack([TEACHER_WEIGHTS.get(k, 1.0) * v for k, v in losses.items()]).sum()
        total.backward()
        # The tower and the language model share no gradient, so each is clipped by itself.
        for group in self.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_([p for p in group["params"] if p.grad is not None], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.text_steps += "text" in losses
        return {k: v.detach() for k, v in losses.items()}

    def run(self) -> None:
        """Train to the end, with a progress bar where there is a terminal and lines elsewhere."""
        began, before = time.monotonic(), self.seconds
        logged, saved, ready = -1e9, self.seconds, time.monotonic()
        shown = [BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn()]
        with Progress(TextColumn("training"), *shown, console=self.console) as bar:
            task = bar.add_task("training", total=1.0)
            for batch in self.batches():
                self.waited += time.monotonic() - ready
                losses = self.train_step(batch)
                self.seconds = before + time.monotonic() - began
                due = self.seconds - logged >= self.recipe.log_seconds
                if due or self.progress() >= 1:
                    logged = self.seconds
                    self.log(losses)
                    bar.update(task, completed=self.progress())
                if self.seconds - saved > 60:
                    saved = self.seconds
                    self.save_checkpoint()
                if self.progress() >= 1:
                    break
                ready = time.monotonic()
        self.save_checkpoint()

    def log(self, losses: dict[str, Tensor]) -> None:
        """One line of losses on the console and in history.json."""
        row = {k: round(float(v), 4) for k, v in losses.items()}
        self.history.append({"step": self.step, "seconds": round(self.seconds, 1), **row})
        self.history[-1]["waited"] = round(self.waited, 1)
        text = " ".join(f"{k} {v:.3f}" for k, v in row.items())
        text = f"{self.seconds:6.1f} s step {self.step:5d} {text} waited {self.waited:.1f} s"
        self.console.print(text, highlight=False)
        (self.out / "history.json").write_text(json.dumps(self.history))

    def save_checkpoint(self) -> None:
        """Write everything that --resume needs, then put it in place in one move."""
        state = {
            "model": self.model.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "clock": [self.step, self.seconds, self.fresh, self.text_steps],
            "history": self.history,
        }
        torch.save(state, self.out / "checkpoint.part")
        os.replace(self.out / "checkpoint.part", self.out / "checkpoint.pt")

    def _load(self) -> None:
        path = self.out / "checkpoint.pt"
        if not path.is_file():
            raise SystemExit(f"--resume needs {path}; start without it to train from scratch")
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.fresh, self.text_steps = state["clock"]
        self.history = state["history"]

    def finish(self) -> dict[str, Any]:
        """Save the model in bf16 in transformers' format, examine it, write card and JSON."""
        # The saved weights are the ones examined: rounded to bf16.
        model = build_model(self.recipe.sizes)
        model.load_state_dict(self.model.state_dict())
        model = model.to(torch.bfloat16)
        folder = self.out / "model"
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        began = time.monotonic()
        result = evaluate(
            model.float().to(self.device),
            self.encode,
            count=self.recipe.test_pictures,
            captions=self.recipe.test_pictures,
            grid=self.recipe.sizes.grid,
            device=self.device,
        )
        gpu = self.device.type == "cuda"
        about = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if gpu else platform.processor() or "CPU",
            "dtype": "bfloat16 weights, bfloat16 autocast" if gpu else "bfloat16 weights, float32",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "vistoken": vistoken.__version__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "recipe": asdict(self.recipe),
            "training": {
                "steps": self.step,
                "steps_of_the_language_model": self.text_steps,
                "seconds": round(self.seconds, 1),
                "different_pictures": self.fresh * self.recipe.batch,
                "evaluation_seconds": round(time.monotonic() - began, 1),
                "losses_at_the_end": self.history[-1] if self.history else {},
            },
        }
        report = {**about, **result}
        (self.out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
        write_card(folder / "README.md", report)
        return report


def augment(pixels: Tensor) -> Tensor:
    """Change brightness and contrast a little and add noise; nothing moves."""
    b = len(pixels)
    gain = 1 + 0.2 * (torch.rand(b, 1, 1, 1, device=pixels.device) - 0.5)
    shift = 0.3 * (torch.rand(b, 1, 1, 1, device=pixels.device) - 0.5)
    return pixels * gain + shift + 0.05 * torch.randn_like(pixels)


def text_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy on the answers; a caption's many tokens weigh half as much each."""
    targets = batch.targets.long()
    terms = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100
    )
    weight = torch.where(batch.segment == 1, 0.5, 1.0) * (targets != -100)
    return (terms * weight.flatten()).sum() / weight.sum()


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, train, save, examine."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for everything written")
    parser.add_argument("--minutes", type=float, help="time for training (evaluation comes on top)")
    parser.add_argument("--steps", type=int, help="stop after so many steps instead")
    parser.add_argument("--batch", type=int, help="pictures a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes that paint pictures")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds on a CPU")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the layers")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not given.smoke:
        parser.error("training needs a GPU; --smoke tries everything out on a CPU")
    recipe = SMOKE if given.smoke else replace(REAL, workers=max(1, (os.cpu_count() or 2) - 2))
    for name in ("minutes", "steps", "batch", "workers"):
        if getattr(given, name) is not None:
            recipe = replace(recipe, **{name: getattr(given, name)})
    if given.minutes is None and given.steps:
        recipe = replace(recipe, minutes=0.0)
    recipe = replace(recipe, seed=given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    compile_layers = torch.cuda.is_available() and not given.smoke and not given.no_compile
    trainer = Trainer(recipe, given.out, resume=given.resume, compile_layers=compile_layers)
    trainer.run()
    report = trainer.finish()
    trainer.console.print_json(json.dumps({k: report[k] for k in ("captions", "cls_attention")}))
    for row in report["accuracy"]:
        trainer.console.print(" ".join(f"{v}" for v in row.values()), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
