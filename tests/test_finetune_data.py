"""Readers of labelled data name what is wrong and where; splits keep equal texts together."""

import csv
import json
from pathlib import Path

import pytest
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from bertgpt.recipes.datasets import Text, read_questions, read_sentences, read_texts
from bertgpt.recipes.metrics import answer_f1, exact_match, macro_f1, span_f1, spans
from bertgpt.recipes.split import hold_out


def written(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_a_table_with_quotes_and_line_ends_inside(tmp_path):
    file = written(
        tmp_path, "a.csv", '\ufefftext,n,label\r\n"a, ""b""\r\nc",1,x\r\n\r\nd,2, y \r\n'
    )
    first, second = read_texts(file)
    assert (first.text, first.label, first.where) == ('a, "b"\nc', "x", f"{file}:2")
    assert (second.text, second.label, second.where) == ("d", "y", f"{file}:5")


def test_a_text_may_be_long(tmp_path):
    limit = csv.field_size_limit()
    (found,) = read_texts(written(tmp_path, "a.csv", f"text,label\n{'word ' * 40_000},x\n"))
    assert len(found.text) == 200_000
    assert csv.field_size_limit() == limit


def test_quotes_mean_nothing_between_tabs(tmp_path):
    file = written(tmp_path, "a.tsv", 'kind\ttext\nx\t"say a\ny\tb\n')
    assert [(t.text, t.label) for t in read_texts(file, label="kind")] == [
        ('"say a', "x"),
        ("b", "y"),
    ]


def test_pairs_of_objects(tmp_path):
    file = written(
        tmp_path, "a.jsonl", '{"p": "a", "q": "b", "label": 1}\n\n{"p": "c", "q": "d", "label": 0}'
    )
    found = read_texts(file, text="p", second="q")
    assert [(t.text, t.second, t.label) for t in found] == [("a", "b", "1"), ("c", "d", "0")]
    assert found[1].where == f"{file}:3"


def test_a_folder_has_a_folder_for_each_class(tmp_path):
    for name, text in {"b/2": "two", "a/1": "one"}.items():
        (tmp_path / name).parent.mkdir()
        written(tmp_path, f"{name}.txt", f"{text}\n")
    assert [(t.label, t.text) for t in read_texts(tmp_path)] == [("a", "one"), ("b", "two")]
    assert [t.label for t in read_texts(tmp_path, label=None)] == ["", ""]
    with pytest.raises(ValueError, match="pairs come in"):
        read_texts(tmp_path, second="b")


TEXT_ERRORS = {
    "missing": ("a.csv", None, FileNotFoundError, "does not exist"),
    "empty": ("a.csv", " \n", ValueError, "a.csv is empty"),
    "header": ("a.csv", "text,label\n", ValueError, "holds no example"),
    "utf8": ("a.csv", b"text,label\nb,x\nc\xa3,y\n", ValueError, "a.csv:3: not UTF-8"),
    "suffix": ("a.xls", "text", ValueError, r"must be a \.csv, \.tsv, \.jsonl file"),
    "column": ("a.csv", "body,label\na,b\n", ValueError, "a.csv:2: no column 'text'.*body, label"),
    "fields": ("a.csv", "text,label\na,b\nc\n", ValueError, "a.csv:3: 1 fields, the header has 2"),
    "quote": ("a.csv", 'text,label\na,b\n"c,d\n', ValueError, "a.csv:3: unexpected end"),
    "text": ("a.csv", "text,label\n ,b\n", ValueError, "a.csv:2: column 'text' is empty"),
    "label": ("a.csv", "text,label\na,\n", ValueError, "a.csv:2: column 'label' must name a class"),
    "twice": ("a.csv", "text,text,label\na,b,c\n", ValueError, "a.csv:1: column 'text' comes twi"),
    "digits": ("a.jsonl", '{"n": ' + "1" * 5000 + "}\n", ValueError, "a.jsonl:1: not valid JSON"),
    "json": ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n', ValueError, "a.jsonl:2: not valid"),
    "object": ("a.jsonl", "[1]\n", ValueError, "a.jsonl:1: must be a JSON object"),
    "kind": ("a.jsonl", '{"text": 3, "label": 1}\n', ValueError, "a.jsonl:1: column 'text' must"),
    "list": ("a.jsonl", '{"text": "a", "label": [1]}\n', ValueError, "a.jsonl:1: column 'label'"),
    "short": ("a.jsonl", '{"text": "a"}\n', ValueError, "a.jsonl:1: no column 'label'"),
}


@pytest.mark.parametrize("case", TEXT_ERRORS)
def test_a_wrong_table_is_named(tmp_path, case):
    name, content, error, message = TEXT_ERRORS[case]
    file = tmp_path / name if content is None else written(tmp_path, name, content)
    with pytest.raises(error, match=message):
        read_texts(file)


def test_a_folder_without_texts_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a folder of .*files for each class"):
        read_texts(tmp_path)


def test_sentences_of_tabs_or_spaces(tmp_path):
    file = written(
        tmp_path, "a.txt", "-DOCSTART- -X- O\n\nNew NN B-geo\nYork NN I-geo\n\t\n\nhi\tO\r\n.\tO"
    )
    first, second = read_sentences(file)
    assert (first.words, first.tags) == (("New", "York"), ("B-geo", "I-geo"))
    assert (first.where, second.where) == (f"{file}:3", f"{file}:7")
    assert second.words == ("hi", ".")
    assert read_sentences(file, tagged=False)[0].tags == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a O\nb\n", "a.txt:2: the word 'b' has no tag"),
        ("a\tO\nb\t\n", "a.txt:2: the word 'b' has no tag"),
        ("a\tO\n\tO\n", "a.txt:2: the line has no word"),
        ("a O\nb X-geo\n", "a.txt:2: unknown tag 'X-geo'"),
        ("a O\nb B-\n", "a.txt:2: unknown tag 'B-'"),
        ("", "a.txt is empty"),
        ("-DOCSTART- O\n", "holds no sentence"),
        (b"a O\n\xff O\n", "a.txt:2: not UTF-8"),
    ],
)
def test_wrong_tags_are_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_sentences(written(tmp_path, "a.txt", content))


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
def test_tables_are_no_tags(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must hold a word a line"):
        read_sentences(written(tmp_path, name, "text,label\nhello world,O\n"), tagged=False)


def squad(qas=1, **changes):
    answers = [{"text": " new york", "answer_start": 19}]
    entry = {"id": "q", "question": "where ?", "answers": answers, **changes}
    context = "new york is not in new york"
    return json.dumps({"data": [{"paragraphs": [{"context": context, "qas": [entry] * qas}]}]})


def test_questions_and_the_nearest_occurrence(tmp_path):
    (question,) = read_questions(written(tmp_path, "a.json", squad()))
    assert question.answers == (("new york", 19),)
    (near,) = read_questions(
        written(tmp_path, "a.json", squad(answers=[{"text": "new york", "answer_start": 2}]))
    )
    assert near.answers == (("new york", 0),)
    (bare,) = read_questions(written(tmp_path, "a.json", squad(answers=[])), answered=False)
    assert bare.answers == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.json is empty"),
        ('{"data":\n[', "a.json:2: not valid JSON"),
        ('{"data": ' + "1" * 5000 + "}", "a.json:1: not valid JSON"),
        ("[]", "'data' must be a list"),
        ('{"data": [1]}', r"data\[0\]: 'paragraphs' must be a list"),
        (squad(question=3), r"data\[0\].paragraphs\[0\].qas\[0\]: 'question' must be a text"),
        (squad(answers=[]), r"qas\[0\]: no answer: .* v2"),
        (squad(answers=[{"text": "oslo", "answer_start": 0}]), "'oslo' is not in the context"),
        (squad(answers=[{"text": "new", "answer_start": "0"}]), "'answer_start' must be a whole"),
        (squad(answers=[{"text": "new", "answer_start": 120}]), "is 120, but .* at character 19"),
        (squad(question=" "), r"qas\[0\]: 'question' is empty"),
        (squad(qas=2), r"qas\[1\]: the id 'q' is taken, by .*qas\[0\]"),
        (b'{"data": "\xff"}', "a.json:1: not UTF-8"),
    ],
)
def test_wrong_questions_are_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_questions(written(tmp_path, "a.json", content))


def texts(pairs):
    return [Text(text, None, label, f"x:{i}") for i, (text, label) in enumerate(pairs)]


@examples(60)
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("ab")), min_size=12, max_size=80))
def test_no_text_is_on_both_sides_and_none_is_lost(pairs):
    given_ = texts([*((f"t{i}", label) for i, label in pairs), *((f"u{i}", "a") for i in range(9))])
    training, held = hold_out(given_, 0.3, seed=1)
    assert not {t.text for t in training} & {t.text for t in held}
    assert sorted(t.where for t in training + held) == sorted(t.where for t in given_)


def test_a_split_is_stratified_and_seeded():
    given_ = texts([(f"t{i}", "a" if i < 80 else "b") for i in range(100)])
    training, held = hold_out(given_, 0.2, seed=3)
    assert [sum(t.label == label for t in held) for label in "ab"] == [16, 4]
    assert hold_out(given_, 0.2, seed=3) == (training, held)
    assert hold_out(given_, 0.2, seed=4)[1] != held


def test_a_text_that_comes_often_counts_once():
    given_ = texts([("t", "a")] * 90 + [(f"t{i}", "a") for i in range(9)])
    assert len({t.text for t in hold_out(given_, 0.2, seed=0)[1]}) == 2


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_to_hold_out_are_refused(count):
    with pytest.raises(ValueError, match="too few"):
        hold_out(texts([(f"t{i}", "a") for i in range(count)]), 0.2)
    with pytest.raises(ValueError, match="between 0 and 1"):
        hold_out(texts([("a", "a"), ("b", "b")]), 1.0)


def test_spans_of_tags():
    tags = ["I-x", "I-x", "B-x", "O", "B-x", "I-y", "I-y"]
    assert spans(tags) == [("x", 0, 2), ("x", 2, 3), ("x", 4, 5), ("y", 5, 7)]
    assert span_f1([["B-x", "O", "B-y"]], [["B-x", "O", "B-x"]]) == pytest.approx(0.5)
    assert span_f1([["B-x", "O"]], [["B-x", "I-x"]]) == 0.0
    assert span_f1([["O"]], [["O"]]) == 1.0


def test_f1_of_classes_weighs_them_alike():
    assert macro_f1(["a"] * 4, ["a", "a", "a", "b"]) == pytest.approx((6 / 7 + 0) / 2)


def test_answers_are_compared_as_squad_does():
    assert exact_match("The  Rose, garden", ["a rose garden"]) == 1.0
    assert exact_match("rose", ["garden", "rose"]) == 1.0
    assert exact_match("rose", ["roses"]) == 0.0
    assert answer_f1("in the red garden", ["garden", "red garden"]) == pytest.approx(4 / 5)
    assert answer_f1("the", ["rose"]) == 0.0
    assert answer_f1("red red", ["red"]) == pytest.approx(2 / 3)
