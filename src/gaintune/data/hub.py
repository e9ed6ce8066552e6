"""Data sets on the Hub: which rows are read, and how a row reads as text, or as prompt and completion."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gaintune.data.documents import Document, Documents, T, cut_passages
from gaintune.data.exchanges import Exchange, question_and_answer
from gaintune.data.readers import Row
from gaintune.errors import AssetError

logger = logging.getLogger(__name__)

Values = Mapping[str, Any]
NOVEL_CHARACTERS = 16_384


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hub, or a local folder of the same layout.

    `render` makes texts or exchanges of its rows; None leaves them as they are. `validation` is None where all rows are
    in `train`. A `streaming` set is read from the start until there is enough, not downloaded whole. `labels` are the
    names of its labels 0, 1, ...
    """

    path: str
    render: Callable[[Iterable[Values]], Iterator[str] | Iterator[Exchange]] | None = None
    train: str = "train"
    validation: str | None = None
    configuration: str | None = None
    streaming: bool = False
    labels: tuple[str, ...] = ()


def load_hub(source: HubSource, name: str, characters: int | None = None) -> Documents[Any]:
    """Load a domain from the Hub: texts as documents, exchanges as they are, with the row they come from.

    With `characters`, a streamed source is read only until each split holds that much text; a source that is not
    streamed is small and is read whole. AssetError for a data set that cannot be reached or has changed names the id,
    and how to give a local copy.
    """
    limit = characters if source.streaming else None
    return _splits(source, name, "domain", lambda split: _documents(source, split, limit))


def load_hub_rows(source: HubSource, name: str, what: str) -> Documents[Row]:
    """Load the rows of a data set whole; `what` names it in an error, which is raised as `load_hub` does."""
    return _splits(source, name, what, lambda split: _rows(source, split))


def _splits(source: HubSource, name: str, what: str, read: Callable[[str], Sequence[T]]) -> Documents[T]:
    try:
        train = read(source.train)
        return Documents(train, read(source.validation) if source.validation else (), source.path)
    except Exception as error:  # the hub client raises errors of many unrelated kinds
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise AssetError(
            f"cannot load {what} {name!r} from the Hub data set {source.path!r}: {reason}. "
            f"Check the network and the id, or give a local copy, a file or a folder: {name}=PATH"
        ) from error


def _load(source: HubSource, split: str) -> Iterable[Any]:
    from datasets import load_dataset  # slow to import, and only the Hub's domains need it

    return load_dataset(source.path, source.configuration, split=split, streaming=source.streaming)


def _rows(source: HubSource, split: str) -> list[Row]:
    rows = enumerate(_load(source, split), start=1)
    found = [Row(dict(values), f"{source.path} {split}: row {number}") for number, values in rows]
    if not found:
        raise ValueError(f"its split {split!r} holds no row")
    return found


def _documents(source: HubSource, split: str, limit: int | None) -> tuple[Document | Exchange, ...]:
    assert source.render is not None
    documents: list[Document | Exchange] = []
    total = empty = 0
    for number, item in enumerate(source.render(_load(source, split)), start=1):
        texts = [item] if isinstance(item, str) else [turn.content for turn in item.turns]
        if not all(text.strip() for text in texts):
            empty += 1
            continue
        origin = f"{source.path} {split}: {'text' if isinstance(item, str) else 'row'} {number}"
        documents.append(Document(item, origin) if isinstance(item, str) else replace(item, origin=origin, row=number))
        total += sum(map(len, texts))
        if limit is not None and total >= limit:
            break
    if empty:
        logger.warning("%s: left out %d empty text(s) of the split %s", source.path, empty, split)
    if not documents:
        raise ValueError(f"its split {split!r} holds no text")
    return tuple(documents)


def answers(prompt: str, completion: str) -> Callable[[Iterable[Values]], Iterator[Exchange]]:
    """Take the prompt of one column and the completion of another, as they stand."""
    return lambda rows: (question_and_answer(row[prompt], row[completion]) for row in rows)


def column(name: str) -> Callable[[Iterable[Values]], Iterator[str]]:
    """Take the text of one column, without the blank space around it."""
    return lambda rows: (row[name].strip() for row in rows)


def pubmedqa_contexts(rows: Iterable[Values]) -> Iterator[str]:
    """Write abstracts without their conclusion, every section under its label."""
    for row in rows:
        context = row["context"]
        sections = zip(context["labels"], context["contexts"], strict=True)
        yield "\n".join(f"{label}: {text}" for label, text in sections)


_ARTICLE_TITLE = re.compile(r" = [^=].* = \n?")


def wikitext_articles(rows: Iterable[Values]) -> Iterator[str]:
    """Join lines into whole articles: a row is a line, and an article starts with a first-level heading."""
    lines: list[str] = []
    for row in rows:
        if _ARTICLE_TITLE.fullmatch(row["text"]) and lines:
            yield "".join(lines)
            lines = []
        if lines or row["text"].strip():
            lines.append(row["text"])
    if lines:
        yield "".join(lines)


def novels(rows: Iterable[Values]) -> Iterator[str]:
    """Cut one passage from the middle of every book, so that a budget spreads over many books."""
    for row in rows:
        passages = list(cut_passages(row["text"], NOVEL_CHARACTERS))
        yield passages[len(passages) // 2][1]


def exam_questions(rows: Iterable[Values]) -> Iterator[str]:
    """Write a question, its options by letter, and the answer."""
    for row in rows:
        question = exam_question(row["question"], row["options"])
        yield f"{question}\nAnswer: {row['answer_idx']}. {row['answer']}"


def exam_question(question: str, options: Mapping[str, str]) -> str:
    """Write a question with its options below it, each after its letter."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in sorted(options.items()))])


def gold_endings(rows: Iterable[Values]) -> Iterator[str]:
    """Write HellaSwag's activity, context and right ending, without the markers of its how-to articles."""
    for row in rows:
        context = f"{row['ctx_a']} {row['ctx_b'][:1].upper()}{row['ctx_b'][1:]}".strip()
        text = f"{row['activity_label']}: {context} {row['endings'][int(row['label'])]}"
        text = re.sub(r"\.?\s*\[title\]", ".", text)
        yield re.sub(r"\s+", " ", re.sub(r"\[[a-z]+\]", "", text)).strip()
