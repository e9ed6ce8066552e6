"""The five embedded domains: three assets and two parts of the standard library, read into documents."""

from __future__ import annotations

import json
import re
import sys
import sysconfig
import tokenize
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from gaintune.storage import assets
from gaintune.data.documents import Document
from gaintune.errors import AssetError

NOTE_KINDS = {
    "includes": "Includes",
    "excludes1": "Excludes1",
    "excludes2": "Excludes2",
    "codeFirst": "Code first",
    "codeAlso": "Code also",
    "useAdditionalCode": "Use additional code",
    "notes": "Note",
}
HEADING = re.compile(r"\n\n(?=[^\n]+\n([*=~\-^])\1{2,}\n)")  # a line underlined with one repeated mark
UNREPRESENTATIVE_MODULES = {"antigravity", "this"}  # a joke and a ciphered poem


def _main_file(name: str) -> Path:
    return assets.fetch(name) / assets.ASSETS[name].members[0]


def medical() -> tuple[Document, ...]:
    """ICD-10-CM: one document a category (three characters), its notes, and its codes in the order of the list."""
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
    """The Constitution of India: one document an article, under its number and title."""
    articles = json.loads(_main_file("law").read_text(encoding="utf-8"))
    documents = []
    for article in articles:
        lines = (line.strip() for line in article["description"].replace("\xa0", " ").splitlines())
        title = article["title"].strip()
        number = article["article"]
        heading = title if number == 0 else f"Article {number}. {title}"
        documents.append(Document("\n".join([heading, *filter(None, lines)]), f"constitution, article {number}"))
    return tuple(documents)


def scripture() -> tuple[Document, ...]:
    """The King James Bible: one document a chapter.

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
    """Python's language reference as `help()` shows it: one document a section; differs between Python versions."""
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
    """The standard library's single-file modules: one document a module; differs between Python versions."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{name}.py" for name in sorted(sys.stdlib_module_names - UNREPRESENTATIVE_MODULES)]
    documents = []
    for file in files:
        if file.is_file():
            with tokenize.open(file) as handle:  # honours a file's declared encoding
                documents.append(Document(handle.read().strip(), f"standard library, {file.name}"))
    if not documents:
        raise AssetError(
            f"this Python ({sys.executable}) has no sources of its standard library in {library}, which are the domain "
            f"'code'; give source files of your own as code=PATH"
        )
    return tuple(documents)
