"""Domains from the Hub: which rows of which data set, and how a row reads as text, or as prompt and completion."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from gaintune.data.documents import Document, Documents, cut_passages
from gaintune.data.exchanges import Exchange, question_and_answer
from gaintune.errors import AssetError

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
Item = TypeVar("Item", str, Exchange)
NOVEL_CHARACTERS = 16_384


@dataclass(frozen=True)
class HubSource(Generic[Item]):
    """A data set on the Hub (or a local folder of the same layout) and the way from its rows to texts or exchanges."""

    path: str
    render: Callable[[Iterable[Row]], Iterator[Item]]
    train: str = "train"
    validation: str | None = None
    configuration: str | None = None
    streaming: bool = False


def load_hub(source: HubSource[Item], name: str, characters: int | None = None) -> Documents[Any]:
    """Load a domain from the Hub: texts as documents, exchanges as they are, each with its place.

    With `characters`, a streamed source is read only until each split holds that much text; a source that is not
    streamed is small and is read whole.

    Raises:
        AssetError: the data set cannot be reached or has changed; names the id and how to give a local copy.
    """
    limit = characters if source.streaming else None
    try:
        train = _documents(source, source.train, limit)
        validation = _documents(source, source.validation, limit) if source.validation else None
    except Exception as error:  # the hub client raises errors of many unrelated kinds
        raise unreachable(error, name, source.path) from error
    return Documents(train, validation, source.path)


def unreachable(error: Exception, name: str, path: str, what: str = "domain") -> AssetError:
    """What a person reads when a data set of the Hub cannot be loaded; `what` it is to them."""
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    return AssetError(
        f"cannot load {what} {name!r} from the Hub data set {path!r}: {reason}. "
        f"Check the network and the id, or give a local copy, a file or a folder: {name}=PATH"
    )


def _documents(source: HubSource[Item], split: str, limit: int | None) -> tuple[Document | Exchange, ...]:
    from datasets import load_dataset  # slow to import, and only these domains need it

    rows = load_dataset(source.path, source.configuration, split=split, streaming=source.streaming)
    documents: list[Document | Exchange] = []
    total = empty = 0
    for number, item in enumerate(source.render(rows), start=1):  # type: ignore[arg-type]  # rows are mappings
        texts = [item] if isinstance(item, str) else [turn.content for turn in item.turns]
        if not all(text.strip() for text in texts):
            empty += 1
            continue
        documents.append(_placed(item, f"{source.path} {split}", number))
        total += sum(map(len, texts))
        if limit is not None and total >= limit:
            break
    if empty:
        logger.warning("%s: left out %d empty text(s) of the split %s", source.path, empty, split)
    if not documents:
        raise ValueError(f"its split {split!r} holds no text")
    return tuple(documents)


def _placed(item: str | Exchange, split: str, number: int) -> Document | Exchange:
    if isinstance(item, str):
        return Document(item, f"{split}: text {number}")
    return replace(item, origin=f"{split}: row {number}", row=number)


def answers(prompt: str, completion: str) -> Callable[[Iterable[Row]], Iterator[Exchange]]:
    """The prompt of one column and the completion of another, as they stand."""

    def exchanges(rows: Iterable[Row]) -> Iterator[Exchange]:
        for row in rows:
            yield question_and_answer(row[prompt], row[completion])

    return exchanges


def pubmedqa_contexts(rows: Iterable[Row]) -> Iterator[str]:
    """Abstracts without their conclusion: each section under its label."""
    for row in rows:
        context = row["context"]
        sections = zip(context["labels"], context["contexts"], strict=True)
        yield "\n".join(f"{label}: {text}" for label, text in sections)


_ARTICLE_TITLE = re.compile(r" = [^=].* = \n?")


def wikitext_articles(rows: Iterable[Row]) -> Iterator[str]:
    """Whole articles: the data set has one line a row, and an article starts with a first-level heading."""
    lines: list[str] = []
    for row in rows:
        if _ARTICLE_TITLE.fullmatch(row["text"]) and lines:
            yield "".join(lines)
            lines = []
        if lines or row["text"].strip():
            lines.append(row["text"])
    if lines:
        yield "".join(lines)


def novels(rows: Iterable[Row]) -> Iterator[str]:
    """One passage from the middle of each book, so that a budget spreads over many books."""
    for row in rows:
        passages = list(cut_passages(row["text"], NOVEL_CHARACTERS))
        yield passages[len(passages) // 2][1]


def exam_questions(rows: Iterable[Row]) -> Iterator[str]:
    """A question, its options by letter, and the answer."""
    for row in rows:
        question = exam_question(row["question"], row["options"])
        yield f"{question}\nAnswer: {row['answer_idx']}. {row['answer']}"


def exam_question(question: str, options: Mapping[str, str]) -> str:
    """A question with its options below it, each after its letter."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in sorted(options.items()))])


def gold_endings(rows: Iterable[Row]) -> Iterator[str]:
    """HellaSwag: the activity, the context and the ending that is right, without the markers of its how-to articles."""
    for row in rows:
        context = f"{row['ctx_a']} {row['ctx_b'][:1].upper()}{row['ctx_b'][1:]}".strip()
        text = f"{row['activity_label']}: {context} {row['endings'][int(row['label'])]}"
        text = re.sub(r"\.?\s*\[title\]", ".", text)
        yield re.sub(r"\s+", " ", re.sub(r"\[[a-z]+\]", "", text)).strip()


def column(name: str) -> Callable[[Iterable[Row]], Iterator[str]]:
    """The text of one column as it stands."""

    def texts(rows: Iterable[Row]) -> Iterator[str]:
        for row in rows:
            yield row[name].strip()

    return texts
