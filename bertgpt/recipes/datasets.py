"""Labelled texts, text pairs, tagged sentences and questions, read from the formats people keep.

Every example knows the file and line it came from, and every mistake in a file is named there.
Nothing is guessed: a file that is wrong in one place is not used at all.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLES = (".csv", ".tsv", ".jsonl")
_FAR = 100  # characters that an answer's place may be off: some files count bytes, or miscount


@dataclass(frozen=True)
class Text:
    """A text, or a pair of texts, and its class.

    Attributes:
        text: the text.
        second: the text beside it, None where there is one only.
        label: name of its class, empty where it was not asked for.
        where: file and line.
    """

    text: str
    second: str | None
    label: str
    where: str

    @property
    def group(self) -> str:
        """Examples of one group are never parted between training and held-out data."""
        return self.text

    @property
    def stratum(self) -> str:
        """What training and held-out data hold in like shares."""
        return self.label


@dataclass(frozen=True)
class Sentence:
    """Words and their tags: O, or B- (a span begins) and I- (it goes on) with the span's type."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    where: str

    @property
    def group(self) -> str:
        """The words."""
        return " ".join(self.words)

    @property
    def stratum(self) -> str:
        """Whether any span is in it."""
        return "spans" if any(tag != "O" for tag in self.tags) else ""


@dataclass(frozen=True)
class Question:
    """A question about a text that holds its answer.

    Attributes:
        id: the file's name for it.
        question: the question.
        context: the text.
        answers: (answer, its first character in the context), as several people gave them; none
            where they were not asked for.
        title: of the article that the context is from.
        where: file, and place in it.
    """

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    title: str
    where: str

    @property
    def group(self) -> str:
        """The article."""
        return self.title

    @property
    def stratum(self) -> str:
        """None."""
        return ""


def read_texts(
    path: Path, *, text: str = "text", second: str | None = None, label: str | None = "label"
) -> list[Text]:
    """Texts and their classes.

    Args:
        path: a .csv or .tsv file with a header, a .jsonl file of one object a line, or a folder
            with a folder of .txt files for each class.
        text: the column of the text.
        second: the column of the text beside it, for pairs.
        label: the column of the class, None if there is none to read.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: another kind of file, an empty one, one that is not UTF-8, a column that is
            absent, a row that does not fit.
    """
    if path.is_dir():
        if second is not None:
            raise ValueError(f"{path} is a folder: pairs come in a {', '.join(TABLES)} file")
        return _read_folder(path, labelled=label is not None)
    if path.suffix.lower() not in TABLES:
        _decode(path)  # a file that is absent is named first
        raise ValueError(f"{path} must be a {', '.join(TABLES)} file, or a folder of class folders")
    rows = _json_rows(path) if path.suffix.lower() == ".jsonl" else _table_rows(path)
    wanted = [name for name in (text, second, label) if name is not None]
    examples = []
    for where, row in rows:
        for name in wanted:
            if name not in row:
                columns = ", ".join(row) or "none"
                raise ValueError(f"{where}: no column {name!r}: the columns are {columns}")
        pair = [_text(row[name], name, where) for name in (text, second) if name is not None]
        kind = "" if label is None else _label(row[label], label, where)
        examples.append(Text(pair[0], pair[1] if second else None, kind, where))
    return _not_empty(examples, path, "example")


def read_sentences(path: Path, *, tagged: bool = True) -> list[Sentence]:
    """Tagged sentences: a word a line, its tag in the last column, an empty line after each.

    Columns are parted by tabs, or else by spaces.

    Args:
        path: the file.
        tagged: whether tags are read; without, the first column is enough.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: an empty file, one that is not UTF-8, a table or JSON by its name, a line
            without a tag, or a tag that is none of O, B-… and I-….
    """
    if path.suffix.lower() in (".csv", ".json", ".jsonl"):  # whose lines would pass for words
        _decode(path)  # a file that is absent is named first
        raise ValueError(f"{path} must hold a word a line, its tag after it, and not {path.suffix}")
    sentences: list[Sentence] = []
    words: list[str] = []
    tags: list[str] = []
    first = 1
    lines = _decode(path).split("\n")
    for number, line in enumerate([*lines, ""], 1):
        columns = [c.strip() for c in line.split("\t")] if "\t" in line else line.split()
        if not any(columns) or columns[0] == "-DOCSTART-":
            if words:
                sentences.append(Sentence(tuple(words), tuple(tags), f"{path}:{first}"))
            words, tags, first = [], [], number + 1
            continue
        if not columns[0]:
            raise ValueError(f"{path}:{number}: the line has no word, {line.strip()!r} alone")
        words.append(columns[0])
        if tagged:
            tags.append(_tag(columns, f"{path}:{number}"))
    return _not_empty(sentences, path, "sentence")


def read_questions(path: Path, *, answered: bool = True) -> list[Question]:
    """Questions in the format of SQuAD v1.1.

    Where `answer_start` is up to 100 characters off, the answer's nearest occurrence is taken.

    Args:
        path: the JSON file.
        answered: whether answers are read.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: an empty file, one that is not UTF-8 or not JSON, a key that is absent, an
            answer that is not in its context or not near its place, a question without an answer
            or without words, an id that comes twice.
    """
    text = _decode(path)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number with too many digits
        line = getattr(error, "lineno", 1)
        raise ValueError(f"{path}:{line}: not valid JSON ({error})") from None
    questions = []
    places: dict[str, str] = {}
    for i, article in enumerate(_key(whole, "data", list, str(path))):
        place = f"{path}: data[{i}]"
        for j, paragraph in enumerate(_key(article, "paragraphs", list, place)):
            where = f"{place}.paragraphs[{j}]"
            context = _key(paragraph, "context", str, where)
            title = str(article.get("title", i))
            for k, entry in enumerate(_key(paragraph, "qas", list, where)):
                question = _question(entry, context, title, f"{where}.qas[{k}]", answered)
                first = places.setdefault(question.id, question.where)
                if first != question.where:
                    raise ValueError(
                        f"{question.where}: the id {question.id!r} is taken, by {first}"
                    )
                questions.append(question)
    return _not_empty(questions, path, "question")


def _question(entry: Any, context: str, title: str, where: str, answered: bool) -> Question:
    question = _key(entry, "question", str, where)
    if not question.strip():
        raise ValueError(f"{where}: 'question' is empty")
    name = str(entry.get("id", where))
    answers: list[tuple[str, int]] = []
    for i, answer in enumerate(_key(entry, "answers", list, where) if answered else ()):
        place = f"{where}.answers[{i}]"
        text = _key(answer, "text", str, place).strip()
        start = _key(answer, "answer_start", int, place)
        found = [m.start() for m in re.finditer(re.escape(text), context)] if text else []
        if not found:
            raise ValueError(f"{place}: the answer {text!r} is not in the context")
        nearest = min(found, key=lambda at: abs(at - start))
        if abs(nearest - start) > _FAR:
            raise ValueError(
                f"{place}: 'answer_start' is {start}, but the nearest {text!r} begins at character "
                f"{nearest} of the context"
            )
        answers.append((text, nearest))
    if answered and not answers:
        raise ValueError(f"{where}: no answer: questions that have none (SQuAD v2) are not done")
    return Question(name, question, context, tuple(answers), title, where)


def _key(holder: Any, name: str, kind: type, where: str) -> Any:
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        known = {list: "list", str: "text", int: "whole number"}[kind]
        raise ValueError(f"{where}: {name!r} must be a {known}, as SQuAD v1.1 has it")
    return value


def _decode(path: Path) -> str:
    """A file's text, every line end a line feed."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist" if not path.exists() else f"{path} is no file"
        )
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8 text ({error.reason}): convert it first"
        ) from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _not_empty(examples: list[Any], path: Path, what: str) -> list[Any]:
    if not examples:
        raise ValueError(f"{path} holds no {what}")
    return examples


def _read_folder(path: Path, labelled: bool) -> list[Text]:
    files = sorted(path.glob("*/*.txt"))
    if not labelled:  # a flat folder of texts will do
        files = sorted(path.glob("*.txt")) or files
    if not files:
        raise ValueError(f"{path} must hold a folder of .txt files for each class")
    return [
        Text(_decode(file).strip(), None, file.parent.name if labelled else "", f"{file}:1")
        for file in files
    ]


def _table_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, columns) of each row; quotes mean something in .csv only."""
    tabs = path.suffix.lower() == ".tsv"
    text = _decode(path)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    header: list[str] | None = None
    line = 1
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(text)))  # a long article is no mistake
    try:
        for row in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if header is None:
                header = [name.strip() for name in row]
                twice = [name for name in header if header.count(name) > 1]
                if twice:
                    raise ValueError(f"{where}: column {twice[0]!r} comes twice")
            elif row:
                if len(row) != len(header):
                    raise ValueError(f"{where}: {len(row)} fields, the header has {len(header)}")
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_decode(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: must be a JSON object, not {line.strip()[:40]}")
        yield f"{path}:{number}", row


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {name!r} must hold text, not {value!r}")
    if not value.strip():
        raise ValueError(f"{where}: column {name!r} is empty")
    return value


def _label(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{where}: column {name!r} must name a class, not {value!r}")
    return str(value).strip()


def _tag(columns: list[str], where: str) -> str:
    if len(columns) < 2 or not columns[-1]:
        raise ValueError(f"{where}: the word {columns[0]!r} has no tag beside it")
    tag = columns[-1]
    if not re.fullmatch(r"O|[BI]-.+", tag):
        raise ValueError(f"{where}: unknown tag {tag!r}: tags are O, B-… and I-…")
    return tag
