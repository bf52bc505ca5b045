"""The words by which CHAIR finds objects in captions, and the text pipeline in front of them."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vistoken.errors import BackendUnavailable, DataError, MethodError
from vistoken.eval import records

LEMMATIZERS = ("builtin", "nltk")

# Noun endings and what may stand for them in the singular: the rules of WordNet's morphy.
_ENDINGS = (
    ("s", ""),
    ("ses", "s"),
    ("ves", "f"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
)
_IRREGULAR = {
    "buffaloes": "buffalo",
    "busses": "bus",
    "children": "child",
    "feet": "foot",
    "flamingoes": "flamingo",
    "geese": "goose",
    "grandchildren": "grandchild",
    "knives": "knife",
    "lives": "life",
    "mice": "mouse",
    "oxen": "ox",
    "people": "person",
    "pocketknives": "pocketknife",
    "taxies": "taxi",
    "teeth": "tooth",
    "wives": "wife",
}
# Words and punctuation marks, close to the Penn Treebank rules of NLTK's word_tokenize. A period
# ends a word before a blank unless the word is a single letter, and always ends the last word.
# Each alternative starts with its mark, before looking back, so that the search skips letters.
_CLOSING = r"""['’”»)\]}>"]*"""
_SPLIT = re.compile(
    r"""[;@#$%&?!*()\[\]{}<>"“”«»„`]|--|\.{2,}|[:,](?!\d)"""
    rf"""|\.(?<=[^\s.]\.)(?={_CLOSING}\s*$)|\.(?<=[^\s.]\.)(?<![\s.][a-z]\.)(?={_CLOSING}\s)"""
    r"""|'(?<=\w')(?:s|m|d|ll|re|ve)?(?!\w)"""
)


@dataclass(frozen=True)
class Lexicon:
    """The words that count as objects.

    `nodes` maps each word or phrase to its object. `phrases` maps sequences of words (singular,
    joined by blanks) to the word or phrase that takes their place, the longest one first.
    `forms` maps plurals to singulars. `silenced` maps a word to another one whose presence
    anywhere in the text removes it (in COCO `seat` to `toilet`).
    """

    nodes: Mapping[str, str]
    phrases: Mapping[str, str] = field(default_factory=dict)
    forms: Mapping[str, str] = field(default_factory=dict)
    silenced: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def coco(cls, *, strict: bool = True) -> Lexicon:
        """Return the paper's table of 80 COCO categories.

        `strict` keeps what the reference implementation cannot find: the three dead entries
        (" motor bike", " cheesecake" and "iPhone") and the plurals its lemmatizer misses, "men"
        and "vases" among them. `strict=False` finds all of these; its scores are not comparable
        with published ones.
        """
        return _shipped_lexicon(strict)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, strict: bool = True) -> Lexicon:
        """Read a table like the paper's `synonyms.txt`: `object, synonym, ...` on each line.

        Phrases and the meaning of `strict` are those of `coco`. Raises DataError with file and
        line if a word belongs to two objects or the file holds none.
        """
        name = os.fspath(path)
        lines = records.read_text(path).splitlines()
        nodes: dict[str, str] = {}
        for number, line in enumerate(lines, start=1):
            # The reference splits at exactly this, which is what leaves some entries dead.
            row = line.strip().split(", ")
            if row[0]:
                _add(nodes, row, row[0], f"{name}:{number}")
        if not nodes:
            raise DataError(f"{name}: the file holds no object")
        return _coco_lexicon(nodes, strict)

    @classmethod
    def from_synonyms(
        cls, synonyms: Mapping[str, Iterable[str]], *, phrases: Mapping[str, str] | None = None
    ) -> Lexicon:
        """Build a table from `{object: [synonym, ...]}`; each object also names itself.

        Words are lower-cased, their plurals are found, names of several words become phrases.
        `phrases` adds further ones, such as `{"toy car": "toy"}`. Raises DataError if a word
        belongs to two objects or there is none.
        """
        nodes: dict[str, str] = {}
        for name, words in synonyms.items():
            plain = [word.strip().lower() for word in (name, *words)]
            _add(nodes, plain, name, f"synonyms[{name!r}]")
        if not nodes:
            raise DataError("synonyms holds no object; give {object: [synonym, ...]}")
        joined = {word: word for word in nodes if " " in word} | dict(phrases or {})
        return cls(nodes, joined, _plurals(nodes, joined))

    @property
    def objects(self) -> tuple[str, ...]:
        """The distinct objects, in the order of the table."""
        return tuple(dict.fromkeys(self.nodes.values()))

    def node(self, name: str) -> str:
        """Return the object of a word or object name; raises DataError if the table lacks it."""
        if name in self.nodes:
            return self.nodes[name]
        if name in self._names:
            return name
        raise DataError(f"the lexicon knows no object {name!r}; it has {', '.join(self.objects)}")

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.nodes.values())

    @functools.cached_property
    def _starts(self) -> dict[str, list[tuple[list[str], str]]]:
        """First word of each phrase -> its phrases as word lists with their replacement."""
        starts: dict[str, list[tuple[list[str], str]]] = {}
        for phrase in sorted(self.phrases, key=lambda text: -text.count(" ")):
            words = phrase.split()
            starts.setdefault(words[0], []).append((words, self.phrases[phrase]))
        return starts

    def join(self, words: list[str]) -> list[str]:
        """Replace phrases in a list of singular words, from left to right."""
        starts = self._starts
        joined: list[str] = []
        done = 0
        for i in [i for i, word in enumerate(words) if word in starts]:
            if i < done:
                continue
            for phrase, replacement in starts[words[i]]:
                if words[i : i + len(phrase)] == phrase:
                    joined += words[done:i]
                    joined.append(replacement)
                    done = i + len(phrase)
                    break
        return [*joined, *words[done:]]


def words_of(text: str, lexicon: Lexicon, lemmatizer: str = "builtin") -> list[str]:
    """Return the tokens of `text`, lower-cased, in the singular and with phrases joined.

    Raises MethodError for an unknown lemmatizer, BackendUnavailable if `nltk` or its data lack.
    """
    if lemmatizer == "builtin":
        plain = f" {text.lower()}".replace("n't", " n't ").replace("cannot", "can not")
        split = _SPLIT.sub(r" \g<0> ", plain).split()
        forms = lexicon.forms
        return lexicon.join([forms.get(word, word) for word in split])
    if lemmatizer == "nltk":
        return lexicon.join(_nltk_pipeline()(text.lower()))
    raise MethodError(f"lemmatizer is {lemmatizer!r}; allowed: {', '.join(LEMMATIZERS)}")


@dataclass(frozen=True)
class _Shipped:
    """The tables of `chair_lexicon.json`, which says where each one comes from."""

    synonyms: Mapping[str, Sequence[str]]
    phrases: Mapping[str, str]
    missed_plurals: Sequence[str]
    shortened: Mapping[str, str]


@functools.cache
def _shipped() -> _Shipped:
    tables = json.loads(Path(__file__).with_name("chair_lexicon.json").read_text(encoding="utf-8"))
    return _Shipped(**{name: table for name, table in tables.items() if name != "about"})


@functools.cache
def _shipped_lexicon(strict: bool) -> Lexicon:
    nodes: dict[str, str] = {}
    for name, words in _shipped().synonyms.items():
        _add(nodes, [name, *words], name, "chair_lexicon.json")
    return _coco_lexicon(nodes, strict)


def _coco_lexicon(nodes: Mapping[str, str], strict: bool) -> Lexicon:
    tables = _shipped()
    if not strict:
        nodes = {word.strip().lower(): node for word, node in nodes.items()}
    forms = _plurals(nodes, tables.phrases)
    if strict:
        missed = frozenset(tables.missed_plurals)
        forms = {plural: word for plural, word in forms.items() if plural not in missed}
        forms |= tables.shortened
    return Lexicon(nodes, tables.phrases, forms, {"seat": "toilet"})


def _add(nodes: dict[str, str], words: Iterable[str], node: str, place: str) -> None:
    for word in words:
        if not word.strip():
            raise DataError(f"{place}: a word is blank")
        if nodes.setdefault(word, node) != node:
            raise DataError(f"{place}: {word!r} stands for {nodes[word]!r} and for {node!r}")


def _plurals(nodes: Mapping[str, str], phrases: Mapping[str, str]) -> dict[str, str]:
    """Return plural -> singular for every word of the table; the shortest singular wins."""
    vocabulary = {word for text in (*nodes, *phrases) for word in text.split()}
    forms: dict[str, str] = {}
    for word in sorted(vocabulary):
        for plural, singular in _ENDINGS:
            if word.endswith(singular):
                form = word.removesuffix(singular) + plural
                forms[form] = min(forms.get(form, word), word, key=len)
    forms |= {plural: word for plural, word in _IRREGULAR.items() if word in vocabulary}
    return {plural: word for plural, word in forms.items() if plural not in vocabulary}


@functools.cache
def _nltk_pipeline() -> Callable[[str], list[str]]:
    """Return the function text -> lemmas of the published LVLM scores, after one trial run."""
    try:
        import nltk
        from nltk.stem import WordNetLemmatizer
    except ImportError as error:
        raise BackendUnavailable(
            "the lemmatizer 'nltk' needs the package nltk: run `pip install 'vistoken[eval]'`, "
            "or use lemmatizer='builtin'"
        ) from error
    lemmatize = WordNetLemmatizer().lemmatize
    # Penn Treebank tags by first letter -> WordNet's parts of speech; all others count as nouns.
    parts = {"J": "a", "V": "v", "N": "n", "R": "r"}

    def lemmas(text: str) -> list[str]:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        return [lemmatize(word, pos=parts.get(tag[:1], "n")) for word, tag in tagged]

    try:
        lemmas("a dog")
    except LookupError as error:
        raise BackendUnavailable(
            "the lemmatizer 'nltk' needs data packages that are not installed: run `python -m "
            "nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet`, or use "
            "lemmatizer='builtin'"
        ) from error
    return lemmas
