"""Tasks of an evaluation: what is asked about each picture, and how the answers are scored.

    plan = make_plan(data, ("pope", "chair", "vqa"), Protocol(), write_prompt)
    results = score(plan, answers)          # answers[i] belongs to plan.asks[i]

POPE asks for objects that are there and, by three strategies, for objects that are not; the
positive questions are the same in all three splits and are asked once. CHAIR asks for a
description, VQA what the data asks. Prompts, limits and parsers are part of the plan and of its
digest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vistoken.errors import DataError, MethodError
from vistoken.eval import chair, pope, records, stats, vqa
from vistoken.eval.items import Data

TASKS = ("pope", "chair", "vqa")
POOLED = "pope"
FILE_SPLIT = "file"

WritePrompt = Callable[[str], str]


@dataclass(frozen=True)
class Protocol:
    """The settings on which published numbers differ; all of them are reported.

    suffix: name in `pope.SUFFIXES` of what follows POPE and VQA questions.
    per_image: POPE questions with yes (and with no, for each strategy) per picture; None is 1 for
    scenes and 3, as in the paper, for other data.
    answer_tokens, caption_tokens: most new tokens of an answer and of a description.
    """

    suffix: str = "llava"
    per_image: int | None = None
    parser: str = "first-word"
    vqa_mode: str = "textvqa"
    lemmatizer: str = "builtin"
    caption_prompt: str = chair.PROMPT
    answer_tokens: int = 16
    caption_tokens: int = 128
    seed: int = 0
    resamples: int = 1000

    def __post_init__(self) -> None:
        for name, allowed in (
            ("suffix", tuple(pope.SUFFIXES)),
            ("parser", pope.PARSERS),
            ("vqa_mode", vqa.MODES),
            ("lemmatizer", chair.LEMMATIZERS),
        ):
            if getattr(self, name) not in allowed:
                raise MethodError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )
        for name in ("answer_tokens", "caption_tokens", "per_image"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise MethodError(f"{name} must be at least 1, got {value}")
        if self.resamples < 0:
            raise MethodError(f"resamples must be at least 0, got {self.resamples}")


@dataclass(frozen=True)
class Ask:
    """One prompt about picture number `picture`, answered with at most `limit` new tokens."""

    picture: int
    prompt: str
    limit: int


@dataclass(frozen=True)
class Entry:
    """One scored item of a split: which ask answers it, and the truth in the protocol's form."""

    id: records.Id
    ask: int
    truth: Any
    type: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that is asked, in a fixed order.

    `splits` maps `pope/random`, ..., `chair` and `vqa` to their entries; several entries may share
    an ask. `notes` say what of the data could not be used.
    """

    data: Data
    tasks: tuple[str, ...]
    protocol: Protocol
    asks: tuple[Ask, ...]
    splits: Mapping[str, tuple[Entry, ...]]
    notes: tuple[str, ...]
    pope_revision: Mapping[str, Any]

    @property
    def by_picture(self) -> list[list[int]]:
        """The asks of each picture that has any, as indices into `asks`."""
        found: dict[int, list[int]] = {}
        for i, ask in enumerate(self.asks):
            found.setdefault(ask.picture, []).append(i)
        return [found[picture] for picture in sorted(found)]

    @property
    def prompts_digest(self) -> str:
        """SHA-256 over all prompts."""
        text = json.dumps([ask.prompt for ask in self.asks])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def digest(self) -> str:
        """SHA-256 over data, prompts and limits: answers to one digest are comparable."""
        names = [picture.name for picture in self.data.pictures]
        asked = [(names[ask.picture], ask.prompt, ask.limit) for ask in self.asks]
        return hashlib.sha256(json.dumps([self.data.digest, asked]).encode()).hexdigest()


@dataclass
class _Asks:
    """Collects asks; the same prompt about the same picture is one ask."""

    write: WritePrompt
    asks: list[Ask] = field(default_factory=list)
    known: dict[Ask, int] = field(default_factory=dict)

    def add(self, picture: int, text: str, limit: int) -> int:
        ask = Ask(picture, self.write(text), limit)
        if ask not in self.known:
            self.known[ask] = len(self.asks)
            self.asks.append(ask)
        return self.known[ask]


def choose_tasks(data: Data, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Return the tasks to run: those wanted, or all that the data can serve; raises `DataError`."""
    unknown = [task for task in wanted or () if task not in TASKS]
    if unknown:
        raise DataError(f"there is no task {unknown[0]!r}; tasks: {', '.join(TASKS)}")
    chosen = tuple(task for task in TASKS if task in (data.tasks if wanted is None else wanted))
    missing = [task for task in chosen if task not in data.tasks]
    if missing or not chosen:
        raise DataError(
            f"{data.source} has nothing for the task {', '.join(missing) or 'asked for'}; "
            f"it serves: {', '.join(data.tasks) or 'no task'}"
        )
    return chosen


def make_plan(
    data: Data, tasks: Sequence[str] | None, protocol: Protocol, write: WritePrompt
) -> Plan:
    """Decide what is asked; `write` puts a question into the model's prompt.

    Raises `DataError` for unknown tasks and for tasks that the data cannot serve.
    """
    chosen = choose_tasks(data, tasks)
    asks, notes = _Asks(write), []
    splits: dict[str, tuple[Entry, ...]] = {}
    revisions: dict[str, Any] = {}
    if "pope" in chosen:
        for name, questions in _pope_questions(data, protocol).items():
            splits[f"pope/{name}"] = _pope_entries(data, protocol, asks, questions)
            revisions[name] = dataclasses.asdict(pope.revision(questions))
        asked = {asks.asks[e.ask].picture for entries in splits.values() for e in entries}
        if len(asked) < len(data.pictures):
            notes.append(
                f"POPE: {len(data.pictures) - len(asked)} of {len(data.pictures)} pictures have "
                "too few objects or no question, and are left out"
            )
    if "chair" in chosen:
        splits["chair"] = tuple(
            Entry(
                picture.name,
                asks.add(i, protocol.caption_prompt, protocol.caption_tokens),
                picture.objects,
            )
            for i, picture in enumerate(data.pictures)
        )
    if "vqa" in chosen:
        suffix = pope.SUFFIXES[protocol.suffix]
        splits["vqa"] = tuple(
            Entry(q.id, asks.add(i, q.text + suffix, protocol.answer_tokens), q.answers, q.type)
            for i, picture in enumerate(data.pictures)
            for q in picture.questions
        )
    return Plan(data, chosen, protocol, tuple(asks.asks), splits, tuple(notes), revisions)


def pope_per_image(data: Data, protocol: Protocol) -> int:
    """Return how many objects that are there POPE asks for, per picture."""
    scenes = data.source.partition(":")[0] == "scenes"
    return protocol.per_image or (1 if scenes else 3)


def _pope_questions(data: Data, protocol: Protocol) -> dict[str, list[pope.Question]]:
    given = [question for picture in data.pictures for question in picture.yes_no]
    if given:
        return {FILE_SPLIT: given}
    images = [{"image": p.name, "objects": p.objects} for p in data.pictures if p.objects]
    per_image = pope_per_image(data, protocol)
    return {
        strategy: pope.build(
            images, strategy, per_image=per_image, num_images=None, seed=protocol.seed
        )
        for strategy in pope.STRATEGIES
    }


def _pope_entries(
    data: Data, protocol: Protocol, asks: _Asks, questions: Sequence[pope.Question]
) -> tuple[Entry, ...]:
    by_name = {picture.name: i for i, picture in enumerate(data.pictures)}
    given = {q.id: i for i, picture in enumerate(data.pictures) for q in picture.yes_no}
    suffix, limit = pope.SUFFIXES[protocol.suffix], protocol.answer_tokens
    return tuple(
        Entry(
            q.id,
            asks.add(given[q.id] if given else by_name[q.image], q.text + suffix, limit),
            q.label,
        )
        for q in questions
    )


def score(plan: Plan, answers: Sequence[str]) -> dict[str, Any]:
    """Score the answers to all asks: a result for each split, and POPE's splits pooled.

    Returns results of `vistoken.eval.pope`, `chair` and `vqa` by the names of the splits; `pope` is
    the pool of its splits. Raises `DataError` unless there is one answer for each ask.
    """
    if len(answers) != len(plan.asks):
        raise DataError(f"{len(plan.asks)} prompts have {len(answers)} answers")
    found = {name: _score_split(plan, name, answers) for name in plan.splits}
    of_pope: dict[str, Any] = {
        name.partition("/")[2]: found[name] for name in found if name.startswith("pope/")
    }
    if of_pope:
        draws = {"resamples": plan.protocol.resamples, "seed": plan.protocol.seed}
        found = {POOLED: pope.combine(of_pope, **draws).pooled, **found}
    return found


def _score_split(plan: Plan, name: str, answers: Sequence[str]) -> stats.Result:
    entries, protocol = plan.splits[name], plan.protocol
    texts = [answers[entry.ask] for entry in entries]
    names = [plan.data.pictures[plan.asks[entry.ask].picture].name for entry in entries]
    draws: dict[str, int] = {"resamples": protocol.resamples, "seed": protocol.seed}
    if name == "chair":
        return chair.score(
            dict(zip(names, texts, strict=True)),
            {picture: entry.truth for picture, entry in zip(names, entries, strict=True)},
            lexicon=plan.data.lexicon,
            lemmatizer=protocol.lemmatizer,
            **draws,
        )
    ids = [entry.id for entry in entries]
    truths = [entry.truth for entry in entries]
    if name == "vqa":
        types = [entry.type or "other" for entry in entries]
        return vqa.evaluate(
            texts, truths, protocol.vqa_mode, ids=ids, images=names, types=types, **draws
        )
    return pope.score(texts, truths, protocol.parser, ids=ids, images=names, **draws)


def compare(first: Mapping[str, Any], second: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Compare two runs split by split: second minus first, see `stats.compare`.

    The pool of POPE holds its positive questions once for each split, so it gets no McNemar test;
    its bootstrap draws whole pictures and stays valid. Empty with fewer than two pictures or
    without resamples.
    """
    protocol = plan.protocol
    if protocol.resamples == 0 or len(plan.data.pictures) < 2:
        return {}
    found = {}
    pooled = sum(name.startswith("pope/") for name in plan.splits) > 1
    for name, one in first.items():
        if len({row.group if row.group is not None else row.id for row in one.rows}) < 2:
            continue
        both = stats.compare(one, second[name], resamples=protocol.resamples, seed=protocol.seed)
        if name == POOLED and pooled:
            both = dataclasses.replace(both, mcnemar=None)
        found[name] = both
    return found
