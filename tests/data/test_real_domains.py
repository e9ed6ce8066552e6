"""The study's domains, and the five embedded ones, whose three small wheels (11 MB) are downloaded once."""

import json

import pytest

from gaintune.config import DataConfig
from gaintune.data import domains as embedded
from gaintune.data import load_domain
from gaintune.data.readers import read_documents
from support import STUDY_DATA, needs_study_data
from support.tiny_domains import load

DOMAINS = STUDY_DATA / "domains"
NAMES = ("pubmedqa", "wikitext", "finphrase", "pg19", "medqa", "lambada", "sst2", "hellaswag")


@needs_study_data("domains")
@pytest.mark.parametrize("name", NAMES)
def test_a_study_domain_keeps_its_own_split_and_fills_the_budget(name, tokenizer):
    source = read_documents(DOMAINS / name)
    for side, documents in (("train", source.train), ("validation", source.validation)):
        lines = (DOMAINS / name / f"{side}.jsonl").read_text(encoding="utf-8").split("\n")
        assert [document.text for document in documents] == [json.loads(line)["text"] for line in lines if line]
    blocks = load(DOMAINS / name, tokenizer, train_tokens=12_288, validation_tokens=4096, block_size=256)
    assert (blocks.train.input_ids.shape, blocks.validation.input_ids.shape) == ((48, 256), (16, 256))
    assert sum(blocks.validation_bytes) > 4096


@needs_study_data("domains")
def test_near_duplicate_headlines_are_found(tokenizer):
    budget = {"train_tokens": 400_000, "validation_tokens": 40_000, "block_size": 256}
    assert 10 < load(DOMAINS / "finphrase", tokenizer, **budget).removed_near_duplicates < 250


@needs_study_data("instruct/gsm8k")
@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_gsm8k_fills_its_budget_and_scores_completions(template, tokenizer):
    budget = {"train_tokens": 32_768, "validation_tokens": 8192, "block_size": 2048}
    blocks = load(STUDY_DATA / "instruct" / "gsm8k", tokenizer, task="instruct", template=template, **budget)
    assert (blocks.train.input_ids.shape, blocks.validation.input_ids.shape) == ((16, 2048), (4, 2048))
    assert blocks.train.position_ids is not None
    ends = (blocks.train.labels == tokenizer.eos_token_id).sum().item()
    assert ends == blocks.train_documents, "every row is whole and ends"
    for row, labels in zip(blocks.validation.input_ids, blocks.validation.labels, strict=True):
        scored = tokenizer.decode(row[labels != -100])
        assert scored.count("####") == scored.count(tokenizer.eos_token) > 0, "every answer names its result"


@pytest.mark.parametrize(("read", "documents", "characters"), [
    (embedded.medical, (1918, 1918), 3_900_000),
    (embedded.law, (465, 465), 460_000),
    (embedded.scripture, (1189, 1189), 4_100_000),
    (embedded.manual, (100, 2000), 300_000),
    (embedded.code, (100, 400), 3_000_000),
])  # fmt: skip
def test_a_domain_is_whole_and_has_no_empty_document(read, documents, characters):
    found = read()
    assert documents[0] <= len(found) <= documents[1]
    assert sum(len(document.text) for document in found) > characters
    assert all(document.text.strip() for document in found)
    assert len({document.origin for document in found}) == len(found)


def by_origin(documents, origin):
    return next(document.text for document in documents if document.origin == origin)


def test_medical_reads_as_the_printed_list_does():
    text = by_origin(embedded.medical(), "ICD-10-CM I24")
    assert text.splitlines()[:4] == [
        "I24 Other acute ischemic heart diseases",
        "Excludes1: angina pectoris (I20.-); transient myocardial ischemia in newborn (P29.4)",
        "Excludes2: non-ischemic myocardial injury (I5A)",
        "I24.0 Acute coronary thrombosis not resulting in myocardial infarction",
    ]
    assert "I24.1 Dressler's syndrome\nPostmyocardial infarction syndrome\n" in text


def test_law_has_its_articles_under_number_and_title():
    documents = embedded.law()
    assert documents[0].text.startswith("Preamble\nWE, THE PEOPLE OF INDIA")
    article = by_origin(documents, "constitution, article 2")
    assert article.startswith("Article 2. Admission or establishment of new States\nParliament may by law admit")
    assert not any("\xa0" in document.text or "\n\n" in document.text for document in documents)


def test_scripture_is_cut_at_chapters():
    documents = embedded.scripture()
    assert documents[0].text.startswith("In the beginning God created the heaven and the earth.")
    assert by_origin(documents, "King James Bible, book 1, chapter 2").startswith("Thus the heavens and the earth")
    assert by_origin(documents, "King James Bible, book 19, chapter 23").startswith("The LORD is my shepherd")
    assert by_origin(documents, "King James Bible, book 43, chapter 11").count("Jesus wept.") == 1
    assert documents[-1].text.endswith("The grace of our Lord Jesus Christ be with you all. Amen.")


def test_manual_is_cut_at_headings_and_code_is_source():
    sections = [document.text for document in embedded.manual()]
    assert any(text.startswith('The "assert" statement\n****') for text in sections)
    assert any(text.startswith("Augmented assignment statements\n====") for text in sections)
    assert "def dataclass(" in by_origin(embedded.code(), "standard library, dataclasses.py")


@pytest.mark.parametrize("name", ["medical", "law", "scripture", "manual", "code"])
def test_a_domain_fills_the_default_budget(name, tokenizer):
    data = DataConfig()
    domain = next(domain for domain in data.domains if domain.name == name)
    blocks = load_domain(domain, data, tokenizer)
    assert (blocks.train.input_ids.shape, blocks.validation.input_ids.shape) == ((32, 256), (16, 256))
    assert min(blocks.train_documents, blocks.validation_documents) >= 3
