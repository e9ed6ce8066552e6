"""The catalogue of domains, and the way from a plan's domain to its documents or rows.

One more domain is one entry of `_ENTRIES`.
"""

from __future__ import annotations

import json
import re
import sys
import sysconfig
import tokenize
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from gaintune.config import DataConfig, DomainConfig, Task
from gaintune.data import hub
from gaintune.data.documents import Document, Documents
from gaintune.data.exchanges import Exchange, read_exchanges
from gaintune.data.readers import local_path, read_documents
from gaintune.errors import AssetError, DataError
from gaintune.storage import ASSETS, fetch

NOTE_KINDS = {
    "includes": "Includes", "excludes1": "Excludes1", "excludes2": "Excludes2", "codeFirst": "Code first",
    "codeAlso": "Code also", "useAdditionalCode": "Use additional code", "notes": "Note",
}  # fmt: skip
HEADING = re.compile(r"\n\n(?=[^\n]+\n([*=~\-^])\1{2,}\n)")  # a line underlined with one repeated mark
UNREPRESENTATIVE_MODULES = {"antigravity", "this"}  # a joke and a ciphered poem


def _main_file(name: str) -> Path:
    return fetch(name) / ASSETS[name].members[0]


def medical() -> tuple[Document, ...]:
    """Read ICD-10-CM: one document a category (three characters), its notes, and its codes in the order of the list."""
    root = ElementTree.parse(_main_file("medical")).getroot()
    return tuple(
        Document("\n".join(_category_lines(category)), f"ICD-10-CM {category.findtext('name')}")
        for category in root.iterfind("chapter/section/diag")
    )


def _category_lines(code: ElementTree.Element) -> Iterator[str]:
    yield f"{code.findtext('name', '').strip()} {code.findtext('desc', '').strip()}"
    if synonyms := [note.text.strip() for note in code.iterfind("inclusionTerm/note") if note.text]:
        yield "; ".join(synonyms)
    for tag, heading in NOTE_KINDS.items():
        for notes in code.iterfind(tag):
            texts = [note.text.strip() for note in notes.iterfind("note") if note.text]
            yield f"{heading}: {'; '.join(texts)}".replace(":;", ":")
    for part in code.iterfind("diag"):
        yield from _category_lines(part)


def law() -> tuple[Document, ...]:
    """Read the Constitution of India: one document an article, under its number and title."""
    documents = []
    for article in json.loads(_main_file("law").read_text(encoding="utf-8")):
        lines = (line.strip() for line in article["description"].replace("\xa0", " ").splitlines())
        title, number = article["title"].strip(), article["article"]
        heading = title if number == 0 else f"Article {number}. {title}"
        documents.append(Document("\n".join([heading, *filter(None, lines)]), f"constitution, article {number}"))
    return tuple(documents)


def scripture() -> tuple[Document, ...]:
    """Read the King James Bible: one document a chapter.

    The file is a Python module, read as text and never run: its first triple-quoted string is the Bible, and the
    mapping after it says at which character each verse starts, by book * 1,000,000 + chapter * 1,000 + verse.
    Square brackets, which mark the words that print sets in italics, are left out.
    """
    module = _main_file("scripture").read_text(encoding="utf-8")
    _, bible, index = module.split('"""', 2)
    starts: dict[int, int] = {}
    for verse, position in re.findall(r"(\d+): (\d+),", index.partition("}")[0]):
        starts.setdefault(int(verse) // 1000, int(position))
    chapters = sorted(starts, key=starts.__getitem__)
    ends = [*(starts[chapter] for chapter in chapters[1:]), len(bible)]
    return tuple(
        Document(
            re.sub(r"[\[\]]", "", bible[starts[chapter] : end]).strip(),
            f"King James Bible, book {chapter // 1000 % 1000}, chapter {chapter % 1000}",
        )
        for chapter, end in zip(chapters, ends, strict=True)
    )


def manual() -> tuple[Document, ...]:
    """Read Python's language reference, which `help()` shows: one document a section; Python versions differ."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise AssetError(
            f"this Python ({sys.executable}) lacks the standard library's pydoc_data, which holds the domain 'manual'; "
            f"install the full standard library, or give text of your own as manual=PATH"
        ) from None
    documents = []
    for name in sorted(topics):
        text = topics[name].strip()
        starts = [0, *(heading.end() for heading in HEADING.finditer(text))]
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
            documents.append(Document(text[start:end].strip(), f"pydoc_data.topics, {name}, character {start}"))
    return tuple(documents)


def code() -> tuple[Document, ...]:
    """Read the standard library's single-file modules: one document a module; Python versions differ."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{name}.py" for name in sorted(sys.stdlib_module_names - UNREPRESENTATIVE_MODULES)]
    documents = []
    for file in files:
        if file.is_file():
            with tokenize.open(file) as handle:  # honors a file's declared encoding
                documents.append(Document(handle.read().strip(), f"standard library, {file.name}"))
    if not documents:
        raise AssetError(
            f"this Python ({sys.executable}) has no sources of its standard library in {library}, which are the domain "
            f"'code'; give source files of your own as code=PATH"
        )
    return tuple(documents)


# More characters than tokens of prose or code ever need: how far a streamed source is read for a budget in tokens.
CHARACTERS_PER_TOKEN = 8
LEAST_STREAMED_CHARACTERS = 2_000_000


@dataclass(frozen=True)
class CatalogueEntry:
    """A domain by name.

    `load` takes the number of characters needed of each split (None: all there is) and returns documents where `task`
    is text, and exchanges where it is instruct. `hub` is its data set on the Hub, None for an embedded domain.
    """

    name: str
    description: str
    licence: str
    source: str
    load: Callable[[int | None], Documents[Any]]
    task: Task = "text"
    hub: hub.HubSource | None = None


def _embedded(name: str, description: str, read: Callable[[], tuple[Document, ...]]) -> CatalogueEntry:
    asset = ASSETS.get(name)
    licence, source = (asset.licence, f"{asset.package} {asset.version}") if asset else ("PSF-2.0", "standard library")
    return CatalogueEntry(name, description, licence, source, lambda _: Documents(read(), source=name))


def _hub(name: str, description: str, licence: str, source: hub.HubSource, task: Task = "text") -> CatalogueEntry:
    return CatalogueEntry(name, description, licence, source.path, partial(hub.load_hub, source, name), task, source)


# fmt: off
_ENTRIES = (
    _embedded("medical", "ICD-10-CM: diseases, codes and coding notes", medical),
    _embedded("law", "the Constitution of India", law),
    _embedded("scripture", "the King James Bible", scripture),
    _embedded("manual", "Python's language reference, from help()", manual),
    _embedded("code", "the standard library's modules", code),
    _hub("pubmedqa", "PubMedQA: abstracts of medical papers, without the labelled (test) ones", "MIT",
         hub.HubSource("qiaojin/PubMedQA", hub.pubmedqa_contexts, configuration="pqa_unlabeled")),
    _hub("wikitext", "WikiText-103: Wikipedia articles", "CC BY-SA 3.0",
         hub.HubSource("Salesforce/wikitext", hub.wikitext_articles, validation="validation",
                       configuration="wikitext-103-raw-v1", streaming=True)),
    _hub("finphrase",
         "Financial PhraseBank, 50 % agreement: financial news (a Parquet copy of takala/financial_phrasebank)",
         "CC BY-NC-SA 3.0",
         hub.HubSource("atrost/financial_phrasebank", hub.column("sentence"), train="train+validation+test")),
    _hub("pg19", "PG-19: novels and other books from before 1919", "Apache-2.0; the books are in the public domain",
         hub.HubSource("emozilla/pg19", hub.novels, validation="validation", streaming=True)),
    _hub("medqa", "MedQA: questions of the US medical licensing examination, with options and answer", "MIT",
         hub.HubSource("GBaker/MedQA-USMLE-4-options", hub.exam_questions)),
    _hub("lambada", "LAMBADA: passages of novels (the public test file: report no LAMBADA score after training on it)",
         "CC BY 4.0",
         hub.HubSource("EleutherAI/lambada_openai", hub.column("text"), train="test", configuration="default")),
    _hub("sst2", "SST-2: phrases of film reviews, in lower case", "not stated (Stanford Sentiment Treebank)",
         hub.HubSource("stanfordnlp/sst2", hub.column("sentence"), validation="validation")),
    _hub("hellaswag", "HellaSwag: everyday activities with their right ending", "MIT",
         hub.HubSource("Rowan/hellaswag", hub.gold_endings, validation="validation")),
    _hub("wikitext2", "WikiText-2: Wikipedia articles, a small part of WikiText-103's", "CC BY-SA 3.0",
         hub.HubSource("Salesforce/wikitext", hub.wikitext_articles, validation="validation",
                       configuration="wikitext-2-raw-v1")),
    _hub("bookcorpusopen", "BookCorpusOpen: novels that their authors give away", "not stated",
         hub.HubSource("lucadiliello/bookcorpusopen", hub.novels, streaming=True)),
    _hub("cc-news", "CC-News: English news articles of 2017 to 2019", "not stated",
         hub.HubSource("vblagoje/cc_news", hub.column("text"), streaming=True)),
    _hub("gsm8k",
         "GSM8K: grade-school mathematics with worked answers (the training split; the test split is left alone)",
         "MIT", hub.HubSource("openai/gsm8k", hub.answers("question", "answer"), configuration="main"), "instruct"),
    _hub("gsm8k-test", "GSM8K measured on its test split, for what learned mathematics from elsewhere", "MIT",
         hub.HubSource("openai/gsm8k", hub.answers("question", "answer"), validation="test", configuration="main"),
         "instruct"),
    _hub("metamathqa", "MetaMathQA: mathematics questions rewritten from GSM8K and MATH, with worked answers", "MIT",
         hub.HubSource("meta-math/MetaMathQA", hub.answers("query", "response"), streaming=True), "instruct"),
    _hub("magicoder", "Magicoder Evol-Instruct: programming tasks with answers", "Apache-2.0",
         hub.HubSource("ise-uiuc/Magicoder-Evol-Instruct-110K", hub.answers("instruction", "response"), streaming=True),
         "instruct"),
    _hub("humaneval", "HumanEval: Python functions to complete (a benchmark: look at it, do not learn it)", "MIT",
         hub.HubSource("openai/openai_humaneval", hub.answers("prompt", "canonical_solution"), train="test"),
         "instruct"),
)
# fmt: on
CATALOGUE = {entry.name: entry for entry in _ENTRIES}


def characters_needed(data: DataConfig) -> int:
    """Return how many characters of each split are enough for a plan's budgets."""
    return max(CHARACTERS_PER_TOKEN * max(data.train_tokens, data.validation_tokens), LEAST_STREAMED_CHARACTERS)


def load_documents(domain: DomainConfig, *, characters: int | None = None) -> Documents[Document]:
    """Load the documents of a domain of text: a catalogue name first, else a local file or folder.

    `characters` is how much text is needed of each split, for sources that are streamed. A DataError names an unknown
    domain or file, or a mistake in a file with its line; an AssetError a failed download.
    """
    entry = _entry(domain, "text")
    if entry is None:
        return read_documents(_path(domain), domain.text_column)
    if domain.text_column is not None:
        raise DataError(f"domain {domain.name!r}: text_column is for local files; {entry.name!r} brings its own")
    return entry.load(characters)


def load_exchanges(domain: DomainConfig, *, characters: int | None = None) -> Documents[Exchange]:
    """Load the rows of a domain of instructions; arguments and errors are those of `load_documents`."""
    entry = _entry(domain, "instruct")
    if domain.text_column is not None:
        raise DataError(
            f"domain {domain.name!r}: text_column is for task text; give prompt_column and completion_column"
        )
    if entry is None:
        return read_exchanges(_path(domain), domain.prompt_column, domain.completion_column)
    if domain.prompt_column is not None or domain.completion_column is not None:
        given = "prompt_column and completion_column are for local files"
        raise DataError(f"domain {domain.name!r}: {given}; {entry.name!r} brings its own")
    return entry.load(characters)


def _entry(domain: DomainConfig, task: Task) -> CatalogueEntry | None:
    """Return the catalogue's entry for a domain's source, None for a path; refuse an entry for another task."""
    entry = CATALOGUE.get(domain.source)
    if entry is not None and entry.task != task:
        raise DataError(
            f"domain {domain.name!r}: {entry.name!r} is for task {entry.task}, and the plan says {task}; set "
            f"task: {entry.task} on the domain, or data.task={entry.task} for all"
        )
    return entry


def _path(domain: DomainConfig) -> Path:
    if (path := local_path(domain.source)) is not None:
        return path
    raise DataError(
        f"domain {domain.name!r}: {domain.source} is no file, folder or catalogue name; {advice_on(domain.source)}; a "
        f"file of yours is named {domain.name}=PATH"
    )


def advice_on(name: str) -> str:
    """Say what somebody may have meant by a name that is not in the catalogue."""
    near = get_close_matches(name, CATALOGUE, n=1)
    return f"did you mean {near[0]!r}?" if near else f"the catalogue holds {', '.join(CATALOGUE)}"
