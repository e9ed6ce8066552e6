"""Bytes of text per token: right in sum for every tokenizer, right for each token where offsets are given."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from gaintune.data.encode import encode_texts

TEXTS = [
    "the cat and the hat",
    "naïve café, 12 €",
    "emoji 😀😀 and 漢字かな",
    " \n  indented\n\n",
    "x",
    "\u0301 combining",
]


def test_byte_level_tokens_count_their_own_bytes(tokenizer):
    """In byte-level BPE a token's string has one character per byte, which gives the count another way."""
    for text, encoded in zip(TEXTS, encode_texts(TEXTS, tokenizer), strict=True):
        strings = tokenizer.convert_ids_to_tokens(encoded.ids.tolist())
        expected = np.array([len(string) for string in strings])
        assert encoded.bytes.sum() == expected.sum() == len(text.encode())
        assert (encoded.bytes >= 0).all()
        if text.isascii():
            assert encoded.bytes.tolist() == expected.tolist()
        else:  # a character that several tokens share counts for the first of them
            ahead = np.cumsum(encoded.bytes) - np.cumsum(expected)
            assert ahead.min() >= 0
            assert ahead.max() <= 3
        assert tokenizer.decode(encoded.ids) == text


def test_spaces_that_offsets_leave_out_are_counted(tokenizer):
    trimming = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)  # as in GPT-2 and RoBERTa
    trimmed = PreTrainedTokenizerFast(tokenizer_object=trimming, eos_token=tokenizer.eos_token)
    offsets = trimmed("the cat", return_offsets_mapping=True)["offset_mapping"]
    assert (4, 5) in offsets or (4, 6) in offsets or (4, 7) in offsets, "the space is in no token's offsets"
    for plain, other in zip(encode_texts(TEXTS, tokenizer), encode_texts(TEXTS, trimmed), strict=True):
        assert plain.bytes.sum() == other.bytes.sum()
    (plain,), (other,) = encode_texts(["the cat and"], tokenizer), encode_texts(["the cat and"], trimmed)
    assert plain.bytes.tolist() == other.bytes.tolist()


def test_text_that_a_tokenizer_drops_is_counted():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words)
    (encoded,) = encode_texts(["One  two \n"], fast)
    assert encoded.bytes.tolist() == [3, 7]


def test_no_special_tokens_are_added(tokenizer):
    with_start = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    end = tokenizer.eos_token
    with_start.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=with_start, eos_token=end)
    assert fast("the")["input_ids"][0] == fast.eos_token_id
    (encoded,) = encode_texts(["the"], fast)
    assert fast.eos_token_id not in encoded.ids


@pytest.mark.parametrize("text", TEXTS)
def test_a_tokenizer_without_offsets_is_right_in_sum(text):
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    (encoded,) = encode_texts([text], slow)
    assert len(encoded.ids) == len(encoded.bytes)
    assert encoded.bytes.sum() == len(text.encode())
    if text.isascii():
        assert set(encoded.bytes.tolist()) == {1}
