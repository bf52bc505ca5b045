"""What an evaluation runs: the configurations of a model, and their answers to a plan."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

import vistoken
from vistoken.errors import MethodError
from vistoken.eval.answers import Exam, answer_ids, generate_answers, prepare, shares_prefix
from vistoken.eval.run_store import Unit
from vistoken.eval.tasks import Plan

BARE = "bare model"
CONTROL = "random"
DEFAULT_METHOD = vistoken.DEFAULT_PRUNING  # what a comparison without a method is of
# Answers with different limits share one reading of the pictures while the longest limit is at
# most this; beyond it a model that never stops would waste more steps than a second reading costs.
_READ_ONCE_UP_TO = 128


@dataclass(frozen=True)
class Configuration:
    """A way to run the model: its name, its part in the comparison, and what is attached."""

    label: str
    role: str  # bare, method or control
    methods: tuple[Any, ...] = ()

    @property
    def recipe(self) -> list[dict[str, Any]]:
        """The methods with all their options."""
        return [method.to_dict() for method in self.methods]

    @property
    def series(self) -> str:
        """The label without the budget: the same for one method at several budgets."""
        names = []
        for method in self.methods:
            changed = [
                f"{key}={getattr(method, key)}"
                for key, field in method.options().items()
                if key not in ("keep", "ratio") and getattr(method, key) != field.default
            ]
            names.append(f"{method.name} ({', '.join(changed)})" if changed else method.name)
        return " + ".join(names) or self.label

    def on(self, model: Any) -> AbstractContextManager[Any]:
        """Attach the methods for the time of a with-block, which gets the attachment or None."""
        return vistoken.attach(model, self.methods) if self.methods else nullcontext()


def make_configurations(
    model: Any,
    methods: Sequence[str] = (),
    *,
    keeps: Sequence[int] = (),
    ratios: Sequence[float] = (),
    options: Sequence[str] = (),
    compare: bool = False,
    seed: int = 0,
) -> list[Configuration]:
    """Return the configurations to run: every method at every budget.

    `compare` puts the bare model in front and random selection with `seed` at the same budgets at
    the end; without any method it compares the default one. Without a budget a ninth of the visual
    tokens stays. `options` are `key=value`, or `method.key=value` for one of several methods.
    Raises `MethodError`.
    """
    if keeps and ratios:
        raise MethodError("give keep or ratio, not both")
    names = list(dict.fromkeys(methods)) or ([DEFAULT_METHOD] if compare else [])
    given = _read_options(options, names)
    budgets: list[dict[str, float]] = [{"keep": keep} for keep in keeps]
    budgets += [{"ratio": ratio} for ratio in ratios]
    if not budgets:
        budgets = [{"keep": max(1, vistoken.inspect(model).facts.visual_tokens // 9)}]
    wanted: list[tuple[str, Any]] = []
    for name in names:
        cls = vistoken.method_class(name)
        pruning = cls.family == "pruning"
        for budget in budgets if pruning else [{}]:
            wanted.append(("method", cls.from_options({**budget, **given[name]})))
    if compare and any(method.family == "pruning" for _, method in wanted):
        control = vistoken.method_class(CONTROL)
        wanted += [("control", control.from_options({**b, "seed": seed})) for b in budgets]
    found: dict[str, Configuration] = {}
    if compare or not wanted:
        found[BARE] = Configuration(BARE, "bare")
    for role, method in wanted:
        if all(method not in held.methods for held in found.values()):
            found[str(method)] = Configuration(str(method), role, (method,))
    return list(found.values())


def _read_options(options: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read `key=value` (for every method) and `method.key=value`."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        owner, dot, inner = key.partition(".")
        if not key or not equals:
            raise MethodError(f"options are written key=value, got {option!r}")
        if dot and owner not in found:
            raise MethodError(f"{option!r} is for {owner}, which is not among: {', '.join(names)}")
        for name in [owner] if dot else names:
            field = vistoken.method_class(name).options().get(inner if dot else key)
            text = field is not None and isinstance(field.default, str)
            found[name][inner if dot else key] = value if text else _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


class Reader:
    """The prompts of one unit of pictures, prepared once and answered by every configuration."""

    def __init__(self, model: Any, processor: Any, plan: Plan, unit: Sequence[Sequence[int]]):
        self.model, self.processor, self.plan, self.unit = model, processor, plan, unit

    @cached_property
    def pictures(self) -> list[Any]:
        """The pictures of the unit."""
        places = [self.plan.asks[asks[0]].picture for asks in self.unit]
        return [self.plan.data.pictures[place].open() for place in places]

    @cached_property
    def exams(self) -> list[tuple[list[list[int]], Exam]]:
        """The asks by picture, and the same ready for the model, for each group of limits."""
        limits = sorted({self.plan.asks[i].limit for asks in self.unit for i in asks})
        together = limits[-1] <= _READ_ONCE_UP_TO
        return [self._exam(group) for group in ([limits] if together else [[n] for n in limits])]

    def _exam(self, limits: Sequence[int]) -> tuple[list[list[int]], Exam]:
        rows, pictures = self._rows(limits)
        prompts = [[self.plan.asks[i].prompt for i in row] for row in rows]
        return rows, prepare(self.processor, pictures, prompts)

    def _rows(self, limits: Sequence[int]) -> tuple[list[list[int]], list[Any]]:
        rows, pictures = [], []
        for picture, asks in zip(self.pictures, self.unit, strict=True):
            row = [i for i in asks if self.plan.asks[i].limit in limits]
            if row:
                rows.append(row)
                pictures.append(picture)
        return rows, pictures

    def answer(self, configuration: Configuration) -> Unit:
        """Answer every prompt of the unit greedily; reading the files does not count as time."""
        with configuration.on(self.model):
            fast = shares_prefix(self.model)
            if fast:
                ready: Any = self.exams
            else:
                limits = sorted({self.plan.asks[i].limit for asks in self.unit for i in asks})
                ready = [(limit, *self._rows([limit])) for limit in limits]
            _wait(self.model)
            began = time.perf_counter()
            found = self._by_prefix(ready) if fast else self._by_generate(ready)
            _wait(self.model)
            seconds = time.perf_counter() - began
        return Unit(tuple(found[i] for asks in self.unit for i in asks), seconds)

    def _by_prefix(self, ready: Sequence[tuple[list[list[int]], Exam]]) -> dict[int, str]:
        found: dict[int, str] = {}
        for rows, exam in ready:
            limits = [[self.plan.asks[i].limit for i in row] for row in rows]
            longest = max(limit for row in limits for limit in row)
            given = answer_ids(self.model, exam, max_new_tokens=longest, batch=len(rows))
            for row, mine, answers in zip(rows, limits, given, strict=True):
                for i, limit, answer in zip(row, mine, answers, strict=True):
                    # Greedy decoding to a shorter limit is the beginning of a longer one.
                    text = self.processor.decode(answer.ids[:limit], skip_special_tokens=True)
                    found[i] = text.strip()
        return found

    def _by_generate(
        self, ready: Sequence[tuple[int, list[list[int]], list[Any]]]
    ) -> dict[int, str]:
        found: dict[int, str] = {}
        for limit, rows, pictures in ready:
            prompts = [[self.plan.asks[i].prompt for i in row] for row in rows]
            given = generate_answers(
                self.model,
                self.processor,
                pictures,
                prompts,
                max_new_tokens=limit,
                batch=len(rows),
            )
            for row, texts in zip(rows, given, strict=True):
                found.update(zip(row, texts, strict=True))
        return found

    def spot_check(self, configuration: Configuration) -> dict[int, str]:
        """Answer one prompt of each split about the first picture by plain `generate`."""
        wanted = set(self.unit[0])
        of_splits = [
            [entry.ask for entry in entries if entry.ask in wanted]
            for entries in self.plan.splits.values()
        ]
        found: dict[int, str] = {}
        with configuration.on(self.model):
            for i in sorted({asks[0] for asks in of_splits if asks}):
                ask = self.plan.asks[i]
                given = generate_answers(
                    self.model,
                    self.processor,
                    self.pictures[:1],
                    [[ask.prompt]],
                    max_new_tokens=ask.limit,
                )
                found[i] = given[0][0]
        return found

    @torch.no_grad()
    def costs(self, configuration: Configuration) -> dict[str, int]:
        """Return visual tokens, FLOPs and KV bytes of the prefill of the unit's first prompt."""
        methods = configuration.methods
        if not methods:  # keeping every token leaves the model bare, and reports what it costs
            methods = (vistoken.method_class("uniform").from_options({"ratio": 0.0}),)
        prompt = self.plan.asks[self.unit[0][0]].prompt
        inputs = self.processor(images=self.pictures[0], text=prompt, return_tensors="pt")
        with vistoken.attach(self.model, methods) as attached:
            self.model(**inputs.to(self.model.device), logits_to_keep=1)
            report = attached.report()
        return {
            "tokens": sum(report.tokens_out),
            "flops": int(report.flops),
            "kv_bytes": int(report.kv_bytes),
        }


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
