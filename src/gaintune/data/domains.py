"""The catalogue of domains, and the way from a plan's domain to its documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from gaintune import assets
from gaintune.config import DomainConfig
from gaintune.data import embedded, hub
from gaintune.data.documents import Document, Documents
from gaintune.data.readers import read_documents
from gaintune.errors import DataError

__all__ = ["CATALOGUE", "CatalogueEntry", "Document", "Documents", "load_documents"]


@dataclass(frozen=True)
class CatalogueEntry:
    """A domain by name; `load` takes the characters that are needed of each split (None: all there is)."""

    name: str
    description: str
    licence: str
    source: str
    load: Callable[[int | None], Documents]


def _embedded(name: str, description: str, licence: str, read: Callable[[], tuple[Document, ...]]) -> CatalogueEntry:
    asset = assets.ASSETS.get(name)
    source = f"{asset.package} {asset.version}" if asset else "standard library"
    return CatalogueEntry(name, description, licence, source, lambda _: Documents(read(), source=name))


def _hub(name: str, description: str, licence: str, source: hub.HubSource) -> CatalogueEntry:
    return CatalogueEntry(name, description, licence, source.path, partial(_load_hub, source, name))


def _load_hub(source: hub.HubSource, name: str, characters: int | None) -> Documents:
    return hub.load_hub(source, name, characters)


def _licence(name: str) -> str:
    return assets.ASSETS[name].licence


CATALOGUE: dict[str, CatalogueEntry] = {
    entry.name: entry
    for entry in (
        _embedded("medical", "ICD-10-CM: diseases, codes and coding notes", _licence("medical"), embedded.medical),
        _embedded("law", "the Constitution of India", _licence("law"), embedded.law),
        _embedded("scripture", "the King James Bible", _licence("scripture"), embedded.scripture),
        _embedded("manual", "Python's language reference, from help()", "PSF-2.0", embedded.manual),
        _embedded("code", "the standard library's modules", "PSF-2.0", embedded.code),
        _hub(
            "pubmedqa",
            "PubMedQA: abstracts of medical papers, without the labelled (test) ones",
            "MIT",
            hub.HubSource("qiaojin/PubMedQA", hub.pubmedqa_contexts, configuration="pqa_unlabeled"),
        ),
        _hub(
            "wikitext",
            "WikiText-103: Wikipedia articles",
            "CC BY-SA 3.0",
            hub.HubSource(
                "Salesforce/wikitext",
                hub.wikitext_articles,
                validation="validation",
                configuration="wikitext-103-raw-v1",
                streaming=True,
            ),
        ),
        _hub(
            "finphrase",
            "Financial PhraseBank, 50 % agreement: financial news (a Parquet copy of takala/financial_phrasebank)",
            "CC BY-NC-SA 3.0",
            hub.HubSource("atrost/financial_phrasebank", hub.column("sentence"), train="train+validation+test"),
        ),
        _hub(
            "pg19",
            "PG-19: novels and other books from before 1919",
            "Apache-2.0; the books are in the public domain",
            hub.HubSource("emozilla/pg19", hub.novels, validation="validation", streaming=True),
        ),
        _hub(
            "medqa",
            "MedQA: questions of the US medical licensing examination, with options and answer",
            "MIT",
            hub.HubSource("GBaker/MedQA-USMLE-4-options", hub.exam_questions),
        ),
        _hub(
            "lambada",
            "LAMBADA: passages of novels (the public test file: report no LAMBADA score after training on it)",
            "CC BY 4.0",
            hub.HubSource("EleutherAI/lambada_openai", hub.column("text"), train="test", configuration="default"),
        ),
        _hub(
            "sst2",
            "SST-2: phrases of film reviews, in lower case",
            "not stated (Stanford Sentiment Treebank)",
            hub.HubSource("stanfordnlp/sst2", hub.column("sentence"), validation="validation"),
        ),
        _hub(
            "hellaswag",
            "HellaSwag: everyday activities with their right ending",
            "MIT",
            hub.HubSource("Rowan/hellaswag", hub.gold_endings, validation="validation"),
        ),
    )
}


def load_documents(domain: DomainConfig, *, characters: int | None = None) -> Documents:
    """Load the documents of a domain: a catalogue name first, else a local file or folder.

    `characters` is how much text the caller needs of each split; only sources that are streamed heed it.

    Raises:
        DataError: no such domain or file, or a mistake in a file, with its line.
        AssetError: a download failed.
    """
    entry = CATALOGUE.get(domain.source)
    if entry is not None:
        if domain.text_column is not None:
            raise DataError(f"domain {domain.name!r}: text_column is for local files; {entry.name!r} brings its own")
        return entry.load(characters)
    path = Path(domain.source).expanduser()
    if not path.exists():
        near = get_close_matches(domain.source, CATALOGUE, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"the catalogue holds {', '.join(CATALOGUE)}"
        raise DataError(f"domain {domain.name!r}: {domain.source} is no file, folder or catalogue name; {advice}")
    return read_documents(path, domain.text_column)
