"""CHAIR, hallucinated objects in captions (Rohrbach et al., EMNLP 2018, arXiv 1809.02156).

Objects are found in text through a closed table of words, `Lexicon`. The table of the paper with
its pipeline is `Lexicon.coco()`; tables of other data are built with `Lexicon.from_synonyms`.
Scores depend on caption length more than on anything else: always read them with recall and length.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vistoken.errors import DataError
from vistoken.eval import records, stats
from vistoken.eval.chair_lexicon import LEMMATIZERS, Lexicon, words_of

__all__ = [
    "LEMMATIZERS",
    "PROMPT",
    "ChairResult",
    "ChairRow",
    "Lexicon",
    "Mention",
    "coco_truth",
    "find",
    "load_captions",
    "mentioned",
    "score",
]

PROMPT = "Please describe this image in detail."


@dataclass(frozen=True, slots=True)
class Mention:
    """An object named in a text: its node, the word used, and its place among the tokens."""

    node: str
    word: str
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChairRow(stats.Row):
    """One caption: objects mentioned (with repetitions), those not in the image, those in it."""

    caption: str
    mentioned: tuple[str, ...]
    hallucinated: tuple[str, ...]
    truth: tuple[str, ...]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ChairResult(stats.Result):
    """Scores of CHAIR as fractions, and the mean length in tokens; lower CHAIR is better."""

    protocol: ClassVar[str] = "chair"
    totals: ClassVar[tuple[str, ...]] = (
        "captions",
        "hallucinated_captions",
        "mentions",
        "hallucinated_mentions",
        "named_objects",
        "present_objects",
        "found_objects",
        "tokens",
    )

    lemmatizer: str
    without_objects: int

    @property
    def chair_s(self) -> float:
        """Share of captions with at least one hallucinated object."""
        return self.metrics["chair_s"]

    @property
    def chair_i(self) -> float:
        """Share of mentions, repetitions counted, that are hallucinated."""
        return self.metrics["chair_i"]

    @property
    def recall(self) -> float:
        """Share of the objects in the images that are mentioned."""
        return self.metrics["recall"]

    @property
    def precision(self) -> float:
        """Share of the distinct objects mentioned that are in the image."""
        return self.metrics["precision"]

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return self.metrics["f1"]

    @property
    def length(self) -> float:
        """Mean number of tokens of a caption, phrases counted once."""
        return self.metrics["length"]

    @staticmethod
    def tally(rows: Sequence[ChairRow]) -> Sequence[float]:
        """Return the totals of one image."""
        named = [set(row.mentioned) for row in rows]
        return (
            len(rows),
            sum(bool(row.hallucinated) for row in rows),
            sum(len(row.mentioned) for row in rows),
            sum(len(row.hallucinated) for row in rows),
            sum(map(len, named)),
            sum(len(row.truth) for row in rows),
            sum(len(found.intersection(row.truth)) for found, row in zip(named, rows, strict=True)),
            sum(row.tokens for row in rows),
        )

    @staticmethod
    def measure(totals: Sequence[float]) -> dict[str, float]:
        """Return CHAIR_s, CHAIR_i, recall, precision, F1 and length."""
        captions, bad_captions, mentions, bad_mentions, named, present, found, tokens = totals
        return {
            "chair_s": stats.ratio(bad_captions, captions),
            "chair_i": stats.ratio(bad_mentions, mentions),
            "recall": stats.ratio(found, present),
            "precision": stats.ratio(found, named),
            "f1": stats.ratio(2 * found, named + present),
            "length": stats.ratio(tokens, captions),
        }

    @staticmethod
    def outcome(row: ChairRow) -> bool | None:
        """Return whether the caption hallucinates nothing."""
        return not row.hallucinated


def find(
    text: str, lexicon: Lexicon | None = None, lemmatizer: str = "builtin"
) -> tuple[list[Mention], int]:
    """Return the objects mentioned in `text`, in order, and its number of tokens.

    `builtin` splits words by rule and looks plurals up in the lexicon, taking every word for a
    noun; it needs no data. `nltk` is the pipeline of published LVLM scores: word_tokenize, POS
    tags and WordNetLemmatizer, so that "a man biking" mentions a bicycle. It raises
    BackendUnavailable if the package or its data are missing. Both raise MethodError for another
    name.
    """
    table = Lexicon.coco() if lexicon is None else lexicon
    words = words_of(text, table, lemmatizer)
    present = set(words)
    gone = {word for word, silencer in table.silenced.items() if silencer in present}
    kept = [word for word in words if word not in gone] if gone else words
    nodes = table.nodes
    return [Mention(nodes[w], w, i) for i, w in enumerate(kept) if w in nodes], len(words)


def mentioned(text: str, lexicon: Lexicon | None = None, lemmatizer: str = "builtin") -> list[str]:
    """Return the objects that `text` mentions, in order and with repetitions; see `find`."""
    return [mention.node for mention in find(text, lexicon, lemmatizer)[0]]


def score(
    captions: Mapping[Any, str] | Sequence[str | Mapping[str, Any]],
    truth: Mapping[Any, Iterable[str]] | Sequence[Iterable[str]],
    *,
    lexicon: Lexicon | None = None,
    lemmatizer: str = "builtin",
    resamples: int = 1000,
    seed: int = 0,
) -> ChairResult:
    """Score captions against the objects in the images.

    `captions` is `{image id: caption}`, a list of `{"image_id": ..., "caption": ...}`, or a list
    of texts; `truth` holds the objects under the same ids, or at the same positions. Recall is
    over the captioned images. Intervals are bootstrapped over images. Raises DataError for
    duplicate ids, captions without truth and objects that the lexicon lacks.
    """
    table = Lexicon.coco() if lexicon is None else lexicon
    texts = _by_image(captions)
    present = truth if isinstance(truth, Mapping) else dict(enumerate(truth))
    rows = []
    for image, caption in texts.items():
        if image not in present:
            raise DataError(_no_truth(image, present))
        objects = {table.node(name) for name in present[image]}
        found, tokens = find(caption, table, lemmatizer)
        nodes = tuple(mention.node for mention in found)
        row = ChairRow(
            id=image,
            group=None,
            caption=caption,
            mentioned=nodes,
            hallucinated=tuple(node for node in nodes if node not in objects),
            truth=tuple(sorted(objects)),
            tokens=tokens,
        )
        rows.append(row)
    empty = sum(not caption.strip() for caption in texts.values())
    return stats.summarize(
        ChairResult,
        rows,
        empty=empty,
        unparsed=empty,
        resamples=resamples,
        seed=seed,
        lemmatizer=lemmatizer,
        without_objects=sum(not row.mentioned for row in rows),
    )


def load_captions(path: str | os.PathLike[str]) -> dict[records.Id, str]:
    """Read captions: JSONL, a JSON list, or the original `{"imgToEval": {...}}` form.

    Records hold `image_id` and `caption`. Raises DataError with file and line, also for duplicate
    ids.
    """
    if '"imgToEval"' in records.read_text(path):
        entries = records.load(path)["imgToEval"]
        found = [records.record_of(entry, f"{path}: {key}") for key, entry in entries.items()]
    else:
        found = records.read(path)
    by_id = records.index(found, "image_id")
    return {identity: record.text("caption") for identity, record in by_id.items()}


def coco_truth(
    instances: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    captions: Mapping[str, Any] | Iterable[Mapping[str, Any]] = (),
    *,
    image_ids: Collection[int] | None = None,
    lexicon: Lexicon | None = None,
    lemmatizer: str = "builtin",
) -> dict[int, set[str]]:
    """Return the objects of each image from loaded COCO annotation files.

    The ground truth of CHAIR is the categories of all `instances` annotations and the objects
    that the reference `captions` mention; both may be several documents. `image_ids` restricts
    the work to some images. Raises DataError for categories that the lexicon lacks.
    """
    table = Lexicon.coco() if lexicon is None else lexicon
    wanted = None if image_ids is None else frozenset(image_ids)
    truth: dict[int, set[str]] = {}
    for document in _documents(instances):
        nodes = {entry["id"]: table.node(entry["name"]) for entry in document["categories"]}
        for image in document["images"]:
            if wanted is None or image["id"] in wanted:
                truth.setdefault(image["id"], set())
        for image_id, annotation in _annotations(document, wanted):
            truth.setdefault(image_id, set()).add(nodes[annotation["category_id"]])
    for document in _documents(captions):
        for image_id, annotation in _annotations(document, wanted):
            found = mentioned(annotation["caption"], table, lemmatizer)
            truth.setdefault(image_id, set()).update(found)
    return truth


def _documents(
    given: Mapping[str, Any] | Iterable[Mapping[str, Any]],
) -> Iterable[Mapping[str, Any]]:
    return (given,) if isinstance(given, Mapping) else given


def _annotations(
    document: Mapping[str, Any], wanted: frozenset[int] | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for annotation in document["annotations"]:
        if wanted is None or annotation["image_id"] in wanted:
            yield annotation["image_id"], annotation


def _by_image(
    captions: Mapping[Any, str] | Sequence[str | Mapping[str, Any]],
) -> dict[Any, str]:
    if isinstance(captions, Mapping):
        texts = dict(captions)
    else:
        records.check_columns(captions=captions)
        pairs = [_with_id(position, entry) for position, entry in enumerate(captions)]
        records.check_ids("captions", [image for image, _ in pairs], len(pairs))
        texts = dict(pairs)
    if not texts:
        raise DataError("there are no captions to score")
    records.check_texts("captions", texts.values())
    return texts


def _with_id(position: int, entry: str | Mapping[str, Any]) -> tuple[records.Id, str]:
    if isinstance(entry, str):
        return position, entry
    record = records.record_of(entry, f"captions[{position}]")
    return record.identity("image_id"), record.text("caption")


def _no_truth(image: Any, truth: Mapping[Any, Any]) -> str:
    message = f"there is no truth for the image {image!r}"
    alike = [known for known in truth if known != image and str(known) == str(image)]
    if alike:
        message += f"; it holds {alike[0]!r}, which is {type(alike[0]).__name__} and not "
        message += type(image).__name__
    return message
