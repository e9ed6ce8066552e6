"""The study's eight domains, read from the folder of data sets beside the checkout."""

from __future__ import annotations

import json

import pytest

from gaintune.config import DataConfig, DomainConfig
from gaintune.data import load_domain
from gaintune.data.readers import read_documents
from support import STUDY_DATA

DOMAINS = STUDY_DATA / "domains"
NAMES = ("pubmedqa", "wikitext", "finphrase", "pg19", "medqa", "lambada", "sst2", "hellaswag")

pytestmark = [
    pytest.mark.study_data,
    pytest.mark.skipif(not DOMAINS.is_dir(), reason=f"the study datasets are not in {DOMAINS}"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_study_domain_keeps_its_own_split_and_fills_the_budget(name, tokenizer):
    source = read_documents(DOMAINS / name)
    for side, documents in (("train", source.train), ("validation", source.validation)):
        lines = (DOMAINS / name / f"{side}.jsonl").read_text(encoding="utf-8").split("\n")
        assert [document.text for document in documents] == [json.loads(line)["text"] for line in lines if line]
    data = DataConfig(
        domains=(DomainConfig(name=name, source=str(DOMAINS / name)),), train_tokens=12_288, validation_tokens=4096
    )
    blocks = load_domain(data.domains[0], data, tokenizer)
    assert blocks.train.input_ids.shape == (48, 256)
    assert blocks.validation.input_ids.shape == (16, 256)
    assert sum(blocks.validation_bytes) > 4096


def test_near_duplicate_headlines_are_found(tokenizer):
    data = DataConfig(
        domains=(DomainConfig(name="finphrase", source=str(DOMAINS / "finphrase")),),
        train_tokens=400_000,
        validation_tokens=40_000,
    )
    blocks = load_domain(data.domains[0], data, tokenizer)
    assert 10 < blocks.removed_near_duplicates < 250


INSTRUCTIONS = DOMAINS.parent / "instruct" / "gsm8k"


@pytest.mark.skipif(not INSTRUCTIONS.is_dir(), reason=f"the study's instructions are not in {INSTRUCTIONS}")
@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_gsm8k_fills_its_budget_and_scores_completions(template, tokenizer):
    data = DataConfig(
        domains=(DomainConfig(name="gsm8k", source=str(INSTRUCTIONS)),),
        task="instruct",
        template=template,
        train_tokens=32_768,
        validation_tokens=8192,
        block_size=2048,
    )
    blocks = load_domain(data.domains[0], data, tokenizer)
    assert blocks.train.input_ids.shape == (16, 2048)
    assert blocks.validation.input_ids.shape == (4, 2048)
    assert blocks.train.position_ids is not None
    ends = (blocks.train.labels == tokenizer.eos_token_id).sum().item()
    assert ends == blocks.train_documents, "every row is whole and ends"
    for row, labels in zip(blocks.validation.input_ids, blocks.validation.labels, strict=True):
        scored = tokenizer.decode(row[labels != -100])
        assert scored.count("####") == scored.count(tokenizer.eos_token) > 0, "every answer names its result"
