"""CHAIR: text vectors of the reference, plurals, scores against a plain re-derivation."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistoken.errors import BackendUnavailable, DataError, MethodError
from vistoken.eval import chair, chair_lexicon

# Nodes found by the reference script with every token tagged as a noun (WordNet 3.0).
VECTORS: dict[str, list[str]] = {
    "Two men and women": ["person"],
    "two people": ["person"],
    "policemen": ["person"],
    "couches": ["couch"],
    "benches and sandwiches": ["bench", "sandwich"],
    "toothbrushes": ["toothbrush"],
    "a pair of scissors": ["scissors"],
    "tvs": ["tv"],
    "knives": ["knife"],
    "a pair of skis": ["skis"],
    "a baby elephant": ["elephant"],
    "an adult giraffe": ["giraffe"],
    "a passenger jet": ["airplane"],
    "a motor bike": [],
    "a cheesecake": [],
    "an iPhone": [],
    "hair dryer": [],
    "hairdryer": ["hair drier"],
    "hair drier": ["hair drier"],
    "stove top oven": ["oven", "oven"],
    "the toilet seat is up": ["toilet"],
    "the seat of the toilet and a chair": ["toilet", "chair"],
    "an orange cat": ["orange", "cat"],
    "a turkey sandwich": ["bird", "sandwich"],
    "a computer mouse": ["laptop", "mouse"],
    "a laptop computer": ["laptop"],
    "wine glasses on a table": ["wine glass", "dining table"],
    "a glass of wine": [],
    "a bowl of fruit": ["bowl"],
    "a container": ["bowl"],
    "the man man man": ["person"] * 3,
    "suitcases and luggage": ["suitcase", "suitcase"],
}
REPAIRED: dict[str, list[str]] = {
    "Two men and women": ["person", "person"],
    "a motor bike": ["motorcycle"],
    "cheesecakes": ["cake"],
    "two iPhones": [
        "cell phone",
    ],
    "vases": ["vase"],
    "macbooks": ["laptop"],
}
# Tokens of NLTK's word_tokenize (quotation marks aside, which it renames).
TOKENS: dict[str, list[str]] = {
    "a dog's bowl, isn't it?": ["a", "dog", "'s", "bowl", ",", "is", "n't", "it", "?"],
    "cats/dogs at 4:30, e.g. 1,000 of them.": [
        "cats/dogs",
        "at",
        "4:30",
        ",",
        "e.g.",
        "1,000",
        "of",
        "them",
        ".",
    ],
    "it cannot be... (a stop-sign) -- no": [
        "it",
        "can",
        "not",
        "be",
        "...",
        "(",
        "a",
        "stop-sign",
        ")",
        "--",
        "no",
    ],
    "one. two dogs'": ["one", ".", "two", "dogs", "'"],
    "j. smith sees 8.": ["j.", "smith", "sees", "8", "."],
}
SHAPES = {"star": ["asterisk"], "heart": [], "house": ["home", "little hut"], "Sun": [], "box": []}


def nltk_or_skip() -> None:
    pytest.importorskip("nltk")
    try:
        chair.find("a dog", lemmatizer="nltk")
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("text", VECTORS)
def test_reference_vectors(text: str) -> None:
    assert chair.mentioned(text) == VECTORS[text]


@pytest.mark.parametrize("text", REPAIRED)
def test_repaired_table_finds_what_the_reference_misses(text: str) -> None:
    assert chair.mentioned(text, chair.Lexicon.coco(strict=False)) == REPAIRED[text]


@pytest.mark.parametrize("text", TOKENS)
def test_tokens(text: str) -> None:
    assert chair_lexicon.words_of(text, chair.Lexicon({})) == TOKENS[text]


def test_table_has_the_published_shape() -> None:
    table = chair.Lexicon.coco()
    assert len(table.objects) == 80
    assert len(table.nodes) == 403
    # 55 keys in the reference, one of them ("stove top oven") three words long and never matched.
    assert len(table.phrases) == 54
    dead = {word for word in table.nodes if word != word.strip().lower()}
    assert dead == {" motor bike", " cheesecake", "iPhone"}
    assert all(
        word in table.phrases or " " not in word.strip()
        for word in table.nodes
        if word not in ("dining table", "stove top oven", " motor bike")
    )


def test_plurals_of_all_words_are_found_but_for_the_listed_ones() -> None:
    table = chair.Lexicon.coco()
    missed = set()
    for word in table.nodes:
        if " " in word.strip() or word != word.strip().lower():
            continue
        if word.endswith(("s", "x", "z", "ch", "sh")):
            plural = word + "es"
        elif word.endswith("y") and word[-2] not in "aeiou":
            plural = word[:-1] + "ies"
        elif word.endswith("man"):
            plural = word[:-2] + "en"
        else:
            plural = word + "s"
        if chair.mentioned(f"the {plural}") != [table.nodes[word]]:
            missed.add(plural)
    assert missed == {
        "bikers", "bluejays", "brindles", "childrens", "coworkers", "firetrucks", "hairdryers",
        "lenovos", "longboards", "macbooks", "men", "netbooks", "paddleboats", "pitbulls",
        "riverboats", "sailboards", "shortboards", "skimboards", "skises", "smartphones",
        "soliders", "stovetops", "teddybears", "televisons", "vases",
    }  # fmt: skip


def test_nltk_agrees_on_the_vocabulary() -> None:
    nltk_or_skip()
    from nltk.stem import WordNetLemmatizer

    table = chair.Lexicon.coco()
    lemmatize = WordNetLemmatizer().lemmatize
    vocabulary = {word for text in (*table.nodes, *table.phrases) for word in text.lower().split()}
    candidates = vocabulary | set(table.forms) | set(chair.Lexicon.coco(strict=False).forms)
    for word in candidates:
        lemma, ours = lemmatize(word), table.forms.get(word, word)
        assert ours == lemma or (ours not in vocabulary and lemma not in vocabulary), word


def test_nltk_lemmatizer_uses_parts_of_speech() -> None:
    nltk_or_skip()
    assert chair.mentioned("a man is biking", lemmatizer="nltk") == ["person", "bicycle"]
    assert chair.mentioned("a man is biking") == ["person"]
    assert chair.mentioned("wine glasses on tables", lemmatizer="nltk") == [
        "wine glass",
        "dining table",
    ]


def test_nltk_missing_names_extra_and_data(monkeypatch: pytest.MonkeyPatch) -> None:
    chair_lexicon._nltk_pipeline.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'vistoken\[eval\]'"):
        chair.mentioned("a dog", lemmatizer="nltk")


def test_nltk_data_missing_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    for cached in (nltk.tokenize._get_punkt_tokenizer, chair_lexicon._nltk_pipeline):
        cached.cache_clear()
    with pytest.raises(
        BackendUnavailable, match="punkt_tab averaged_perceptron_tagger_eng wordnet"
    ):
        chair.mentioned("a dog", lemmatizer="nltk")


def test_unknown_lemmatizer_is_refused() -> None:
    with pytest.raises(MethodError, match="'spacy'; allowed: builtin, nltk"):
        chair.mentioned("a dog", lemmatizer="spacy")


def test_mentions_carry_word_and_index() -> None:
    found, tokens = chair.find("A puppy near the traffic lights and a bow tie")
    assert found == [
        chair.Mention("dog", "puppy", 1),
        chair.Mention("traffic light", "traffic light", 4),
        chair.Mention("tie", "tie", 7),
    ]
    assert tokens == 8
    assert chair.find("a toilet seat and a seat")[1] == 5
    # The reference shortens "sports" before it looks for pairs.
    assert chair.find("a sports ball") == ([chair.Mention("sports ball", "ball", 2)], 3)


def test_worked_example() -> None:
    result = chair.score({1: "a dog and a cat and a cat"}, {1: ["dog"]})
    assert (result.chair_s, result.chair_i) == (1, pytest.approx(2 / 3))
    assert (result.recall, result.precision) == (1, 0.5)
    assert result.f1 == pytest.approx(2 / 3) and result.length == 8


def test_captions_without_objects_and_empty_ones_give_zeros() -> None:
    result = chair.score(["nothing here", " "], [[], ["dog"]])
    assert {name: result.metrics[name] for name in ("chair_s", "chair_i", "recall")} == {
        "chair_s": 0,
        "chair_i": 0,
        "recall": 0,
    }
    assert (result.without_objects, result.empty, result.parsed) == (2, 1, 1)


def plain_chair(captions: dict[int, list[str]], truth: dict[int, set[str]]) -> dict[str, float]:
    """The definitions, word by word, for captions given as lists of objects."""
    wrong = [[m for m in captions[i] if m not in truth[i]] for i in captions]
    mentions = [m for named in captions.values() for m in named]
    found = sum(len(set(captions[i]) & truth[i]) for i in captions)
    named, present = sum(len(set(c)) for c in captions.values()), sum(map(len, truth.values()))
    return {
        "chair_s": sum(bool(w) for w in wrong) / len(captions),
        "chair_i": sum(map(len, wrong)) / len(mentions) if mentions else 0,
        "recall": found / present if present else 0,
        "precision": found / named if named else 0,
        "length": sum(len(c) for c in captions.values()) / len(captions),
    }


OBJECTS = ["dog", "cat", "car", "wine glass", "person"]


@given(
    images=st.lists(
        st.tuples(
            st.lists(st.sampled_from(OBJECTS), max_size=5), st.sets(st.sampled_from(OBJECTS))
        ),
        min_size=1,
        max_size=6,
    )
)
def test_scores_against_the_definitions(images: list[tuple[list[str], set[str]]]) -> None:
    captions = {i: named for i, (named, _) in enumerate(images)}
    truth = {i: present for i, (_, present) in enumerate(images)}
    result = chair.score({i: " ".join(c) for i, c in captions.items()}, truth, resamples=0)
    for name, value in plain_chair(captions, truth).items():
        assert result.metrics[name] == pytest.approx(value), name
    assert [list(row.mentioned) for row in result.rows] == list(captions.values())


def test_truth_is_mapped_through_the_table() -> None:
    assert chair.score(["a puppy and a man"], [["dog", "woman"]]).chair_i == 0


@pytest.mark.parametrize(
    ("captions", "truth", "reason"),
    [
        ([{"image_id": 1, "caption": "a"}] * 2, {1: []}, r"captions\[1\] repeats 1"),
        ({1: "a dog"}, {2: ["dog"]}, "no truth for the image 1$"),
        ({1: "a dog"}, {"1": ["dog"]}, "holds '1', which is str and not int"),
        ({1: "a dog"}, {1: ["unicorn"]}, "knows no object 'unicorn'"),
        ([{"image_id": 1}], {1: []}, "'caption' is missing"),
        ([5], [[]], r"captions\[0\]: each record must be a JSON object"),
        ({1: None}, {1: []}, r"captions\[0\] must be text"),
        ({}, {}, "no captions"),
        ([], [], "no items"),
    ],
)
def test_bad_captions_are_refused(captions: Any, truth: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        chair.score(captions, truth)


def test_tables_built_in_code() -> None:
    table = chair.Lexicon.from_synonyms(SHAPES, phrases={"toy house": "box"})
    assert table.objects == ("star", "heart", "house", "Sun", "box")
    text = "Two stars, an asterisk, hearts, a little hut, boxes, suns, a toy house and homes"
    assert chair.mentioned(text, table) == [
        "star", "star", "heart", "house", "box", "Sun", "box", "house",
    ]  # fmt: skip
    result = chair.score(["a star"], [["star", "Sun"]], lexicon=table)
    assert (result.chair_i, result.recall) == (0, 0.5)


def test_longest_phrase_wins() -> None:
    table = chair.Lexicon.from_synonyms({"car": ["toy car"], "track": ["toy car track"]})
    assert chair.mentioned("a toy car and toy car tracks", table) == ["car", "track"]


@pytest.mark.parametrize(
    ("synonyms", "reason"),
    [
        ({"cat": ["kitty"], "dog": ["kitty"]}, "'kitty' stands for 'cat' and for 'dog'"),
        ({"cat": [" "]}, r"synonyms\['cat'\]: a word is blank"),
        ({}, "no object"),
    ],
)
def test_bad_tables_are_refused(synonyms: dict[str, list[str]], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        chair.Lexicon.from_synonyms(synonyms)


def test_tables_are_read_from_files(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text("dog, puppy\nmotorcycle,  motor bike\nwine glass\nperson, man\n")
    strict = chair.Lexicon.from_file(path)
    text = "a motor bike, puppies, men, wine glasses"
    assert chair.mentioned(text, strict) == ["dog", "wine glass"]
    repaired = chair.Lexicon.from_file(path, strict=False)
    assert chair.mentioned(text, repaired) == ["motorcycle", "dog", "person", "wine glass"]
    path.write_text("dog, puppy\ncat, puppy\n")
    with pytest.raises(DataError, match="synonyms.txt:2: 'puppy' stands for"):
        chair.Lexicon.from_file(path)
    with pytest.raises(DataError, match="cannot be read"):
        chair.Lexicon.from_file(tmp_path / "absent.txt")


def test_shipped_table_equals_its_own_text_form(tmp_path: Path) -> None:
    table = chair.Lexicon.coco()
    rows: dict[str, list[str]] = {}
    for word, node in table.nodes.items():
        rows.setdefault(node, [node]).extend([word] if word != node else [])
    path = tmp_path / "synonyms.txt"
    path.write_text("\n".join(", ".join(row) for row in rows.values()))
    assert chair.Lexicon.from_file(path) == table


def test_caption_files(tmp_path: Path) -> None:
    expected = {1: "a dog", 2: "a cat"}
    rows = [{"image_id": i, "caption": c} for i, c in expected.items()]
    forms = {
        "list.json": json.dumps(rows),
        "lines.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "original.json": json.dumps({"overall": {}, "imgToEval": {r["image_id"]: r for r in rows}}),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        assert chair.load_captions(tmp_path / name) == expected
    (tmp_path / "twice.jsonl").write_text(forms["lines.jsonl"] * 2)
    with pytest.raises(DataError, match=r"twice.jsonl:3: image_id 1 occurs twice"):
        chair.load_captions(tmp_path / "twice.jsonl")


def test_truth_from_coco_annotations() -> None:
    instances = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "tv"}],
        "annotations": [{"image_id": 1, "category_id": 9}, {"image_id": 1, "category_id": 4}],
    }
    captions = {"annotations": [{"image_id": 2, "caption": "Two sofas"}]}
    assert chair.coco_truth(instances, captions) == {1: {"dog", "tv"}, 2: {"couch"}}
    assert chair.coco_truth([instances], [captions], image_ids=[2]) == {2: {"couch"}}


def test_ten_thousand_captions_take_less_than_two_seconds() -> None:
    rng = random.Random(0)
    words = ["dogs", "man", "table", "the", "blue", "wine", "glasses", "isn't", "near,", "sky."]
    captions = {i: " ".join(rng.choices(words, k=25)) for i in range(10_000)}
    truth = {i: ["dog", "dining table"] for i in captions}
    start = time.process_time()
    result = chair.score(captions, truth)
    assert time.process_time() - start < 2
    assert result.intervals["chair_i"].low < result.chair_i < result.intervals["chair_i"].high
