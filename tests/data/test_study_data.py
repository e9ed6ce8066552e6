"""The study's eight domains, read from the folder of data sets beside the checkout."""

import json

import pytest

from gaintune.data.readers import read_documents
from support import STUDY_DATA, needs_study_data
from support.tiny_domains import load

DOMAINS = STUDY_DATA / "domains"
NAMES = ("pubmedqa", "wikitext", "finphrase", "pg19", "medqa", "lambada", "sst2", "hellaswag")


@needs_study_data("domains")
@pytest.mark.parametrize("name", NAMES)
def test_a_study_domain_keeps_its_own_split_and_fills_the_budget(name, tokenizer):
    source = read_documents(DOMAINS / name)
    for side, documents in (("train", source.train), ("validation", source.validation or ())):
        lines = (DOMAINS / name / f"{side}.jsonl").read_text(encoding="utf-8").split("\n")
        assert [document.text for document in documents] == [json.loads(line)["text"] for line in lines if line]
    blocks = load(DOMAINS / name, tokenizer, train_tokens=12_288, validation_tokens=4096, block_size=256)
    assert (blocks.train.input_ids.shape, blocks.validation.input_ids.shape) == ((48, 256), (16, 256))
    assert sum(blocks.validation_bytes) > 4096


@needs_study_data("domains")
def test_near_duplicate_headlines_are_found(tokenizer):
    budget = {"train_tokens": 400_000, "validation_tokens": 40_000, "block_size": 256}
    blocks = load(DOMAINS / "finphrase", tokenizer, **budget)
    assert 10 < blocks.removed_near_duplicates < 250


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
