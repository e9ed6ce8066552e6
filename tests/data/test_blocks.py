"""Packing: what is in the blocks, in which order, within which budget, and what is counted."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gaintune.config import DataConfig, DomainConfig
from gaintune.data import load_domain
from gaintune.errors import BaseModelError, DataError
from support import refused

TEXTS = [f"document {number}: " + " ".join(f"w{number}x{word}" for word in range(12)) for number in range(120)]


def settings(source, **changes):
    values = {"train_tokens": 512, "validation_tokens": 128, "block_size": 64} | changes
    return DataConfig(domains=(DomainConfig(name="d", source=str(source)),), **values)


def load(source, tokenizer, **changes):
    data = settings(source, **changes)
    return load_domain(data.domains[0], data, tokenizer)


def test_blocks_hold_whole_documents_in_a_drawn_order_with_end_of_text_between(write_rows, tokenizer):
    blocks = load(write_rows("d.jsonl", TEXTS), tokenizer, train_tokens=2048)
    assert blocks.name == "d"
    assert blocks.train.input_ids.shape == (2048 // 64, 64)
    assert blocks.validation.input_ids.shape == (2, 64)
    assert blocks.train.input_ids.dtype == blocks.validation.input_ids.dtype == torch.int64
    drawn = tokenizer.decode(blocks.train.input_ids.flatten()).split(tokenizer.eos_token)
    assert set(drawn[:-1]) <= set(TEXTS), "all but the last, which the budget cuts, are whole"
    assert any(text.startswith(drawn[-1]) for text in TEXTS)
    assert len(drawn) == len(set(drawn)) == blocks.train_documents
    assert drawn != sorted(drawn)
    held_out = tokenizer.decode(blocks.validation.input_ids.flatten()).split(tokenizer.eos_token)
    assert len(held_out) == blocks.validation_documents
    assert not set(held_out) & set(drawn)


def test_the_same_plan_gives_the_same_blocks_and_another_seed_others(write_rows, tokenizer):
    file = write_rows("d.jsonl", TEXTS)
    first, second, other = load(file, tokenizer), load(file, tokenizer), load(file, tokenizer, seed=1)
    assert torch.equal(first.train.input_ids, second.train.input_ids)
    assert torch.equal(first.validation.input_ids, second.validation.input_ids)
    assert first.content_hash == second.content_hash
    assert not torch.equal(first.train.input_ids, other.train.input_ids)
    assert len({first.content_hash, other.content_hash}) == 2


def test_the_hash_follows_the_text_and_the_settings_not_the_path(write_rows, tokenizer):
    first = load(write_rows("a.jsonl", TEXTS), tokenizer)
    assert load(write_rows("b.jsonl", TEXTS), tokenizer).content_hash == first.content_hash
    changed = load(write_rows("c.jsonl", [text.replace("x3", "y3") for text in TEXTS]), tokenizer)
    assert changed.content_hash != first.content_hash
    assert load(write_rows("a.jsonl", TEXTS), tokenizer, validation_tokens=130).content_hash != first.content_hash


def test_validation_does_not_depend_on_the_training_budget_and_budgets_nest(write_rows, tokenizer):
    file = write_rows("d.jsonl", TEXTS)
    small, large = load(file, tokenizer, train_tokens=256), load(file, tokenizer, train_tokens=1024)
    assert torch.equal(small.validation.input_ids, large.validation.input_ids)
    assert torch.equal(small.train.input_ids, large.train.input_ids[:4])


def test_near_duplicates_of_training_text_are_left_out_of_validation(tmp_path, write_rows, tokenizer, caplog):
    write_rows("d/train.jsonl", TEXTS[:20])
    copies = [TEXTS[0].replace("w0x5", "changed"), TEXTS[1].upper()]
    write_rows("d/validation.jsonl", [*copies, *TEXTS[20:23]])
    with caplog.at_level(logging.INFO, "gaintune"):
        blocks = load(tmp_path / "d", tokenizer, train_tokens=100_000, validation_tokens=64)
    assert blocks.removed_near_duplicates == 2
    held_out = tokenizer.decode(blocks.validation.input_ids.flatten())
    assert "changed" not in held_out
    assert "W1X5" not in held_out
    assert "left 2 validation document(s) out" in caplog.text
    assert f"{tmp_path / 'd' / 'validation.jsonl'}:1" in caplog.text


def test_only_text_that_is_trained_on_counts_as_seen(tmp_path, write_rows, tokenizer):
    write_rows("d/train.jsonl", TEXTS[:100])
    write_rows("d/validation.jsonl", TEXTS[:100])
    blocks = load(tmp_path / "d", tokenizer, train_tokens=256)
    trained_on = set(tokenizer.decode(blocks.train.input_ids.flatten()).split(tokenizer.eos_token))
    held_out = set(tokenizer.decode(blocks.validation.input_ids.flatten()).split(tokenizer.eos_token))
    assert held_out
    assert not trained_on & held_out


def test_a_domain_smaller_than_its_budget_is_used_up_with_a_warning(write_rows, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "gaintune"):
        blocks = load(write_rows("d.jsonl", TEXTS), tokenizer, train_tokens=10**6)
    tokens = blocks.train.input_ids.numel()
    assert 64 < tokens < 10**6
    assert f"fewer than the 1000000 asked for; using {tokens}" in caplog.text
    drawn = tokenizer.decode(blocks.train.input_ids.flatten()).split(tokenizer.eos_token)
    assert blocks.train_documents == len(drawn)


def test_documents_beyond_the_last_whole_block_are_not_counted(tmp_path, write_rows, tokenizer):
    write_rows("d/train.jsonl", [f"n{number}" for number in range(100, 200)])
    write_rows("d/validation.jsonl", TEXTS)
    blocks = load(tmp_path / "d", tokenizer, train_tokens=10**4)
    drawn = tokenizer.decode(blocks.train.input_ids.flatten()).split(tokenizer.eos_token)
    assert blocks.train_documents == len([text for text in drawn if text]) < 100


@pytest.mark.parametrize(("train", "validation", "says"), [
    (["few words"], TEXTS, r"the training part holds \d+ tokens, fewer than one block of 64"),
    (TEXTS, ["few words"], r"the validation part holds \d+ tokens, fewer than one block of 64"),
    (TEXTS[:5], TEXTS[:5], "validation part holds no text, after 5 near-duplicate"),
])  # fmt: skip
def test_less_than_a_block_is_an_error_that_names_the_source(tmp_path, write_rows, tokenizer, train, validation, says):
    write_rows("d/train.jsonl", train)
    write_rows("d/validation.jsonl", validation)
    with pytest.raises(DataError, match=says) as caught:
        load(tmp_path / "d", tokenizer, train_tokens=10**5)
    assert f"domain 'd', {tmp_path / 'd'}: " in str(caught.value)


def test_bytes_of_the_scored_tokens_are_exact(write_rows, tokenizer):
    """ASCII text in byte-level BPE: a token's string has as many characters as bytes; end-of-text stands for none."""
    blocks = load(write_rows("d.jsonl", TEXTS), tokenizer)
    for block, found in zip(blocks.validation.input_ids, blocks.validation_bytes, strict=True):
        scored = [token for token in block[1:].tolist() if token != tokenizer.eos_token_id]
        assert found == sum(len(string) for string in tokenizer.convert_ids_to_tokens(scored))


def test_bytes_add_up_to_those_of_the_documents(tmp_path, write_rows, tokenizer):
    texts = ["äöü €uro 漢字 😀 " * 8 + str(number) for number in range(3)]
    write_rows("d/train.jsonl", TEXTS)
    write_rows("d/validation.jsonl", texts)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    size = sum(map(len, ids)) + 2  # all three and the end-of-text between: one block
    blocks = load(tmp_path / "d", tokenizer, train_tokens=size, validation_tokens=size, block_size=size)
    unscored = len("ä".encode())  # the first token of the block
    assert sum(blocks.validation_bytes) == sum(len(text.encode()) for text in texts) - unscored


def test_a_tokenizer_without_end_of_text_is_refused(write_rows, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    refused(BaseModelError, "no end-of-text token", load, write_rows("d.jsonl", TEXTS), bare)
