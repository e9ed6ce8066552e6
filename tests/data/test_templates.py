"""Templates: what the model sees of a row, what of it is scored, and its tokens at the border between the two."""

import re
from datetime import datetime

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from gaintune.data import beginning_of_text, encode_parts
from gaintune.data.encode import Part, Rendered, encode_texts, render, undated
from gaintune.data.exchanges import Exchange, Turn, question_and_answer
from gaintune.errors import ConfigError, DataError
from support import refused

PAIR = question_and_answer("Two and two?", "Four.")


def chat(*turns):
    return Exchange(tuple(Turn(role, text, scored=role == "assistant") for role, text in turns), True, "f:1", 1)


def test_plain_adds_nothing(tokenizer):
    expected = Rendered((Part("Two and two?", False), Part("Four.", True)))
    assert render(PAIR, "plain", tokenizer) == expected == render(PAIR, "auto", tokenizer)


TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


@pytest.mark.parametrize(("name", "pattern"), [
    ("alpaca", re.escape(f"{TASK}### Instruction:\nTwo and two?\n\n### Response:\n")),
    ("magicoder", r"You are an exceptionally .*\n\n@@ Instruction\nTwo and two\?\n\n@@ Response\n"),
])  # fmt: skip
def test_templates_of_known_data_sets(tokenizer, name, pattern):
    prompt, completion = render(PAIR, name, tokenizer).parts
    assert re.fullmatch(pattern, prompt.text, re.DOTALL)
    assert completion == Part("Four.", True) and not prompt.scored


def test_braces_in_a_prompt_stay(tokenizer):
    exchange = question_and_answer("print({prompt}) {0} {completion}", "x")
    assert "\nprint({prompt}) {0} {completion}\n" in render(exchange, "alpaca", tokenizer).parts[0].text


TALK = chat(("user", "a"), ("assistant", "b"))


def test_messages_of_one_question_fit_a_template_and_a_conversation_only_chat(tokenizer):
    assert render(TALK, "plain", tokenizer).parts == (Part("a", False), Part("b", True))
    exchange = chat(("system", "Be brief."), ("user", "a"), ("assistant", "b"))
    message = r"^f:1: template 'alpaca' takes one message .* system, user, assistant; use"
    refused(DataError, message, render, exchange, "alpaca", tokenizer)
    refused(ConfigError, r"^data.template: .* has no chat template", render, TALK, "auto", tokenizer)


def test_chat_scores_every_answer_up_to_its_end_of_turn(chatty):
    exchange = chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    rendered = render(exchange, "auto", chatty)
    start = "<|begin|><|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    again = "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    parts = ((start, False), ("b<|im_end|>", True), (again, False), ("d<|im_end|>", True))
    assert rendered == Rendered(tuple(Part(*part) for part in parts), ends=True)
    messages = [{"role": turn.role, "content": turn.content} for turn in exchange.turns]
    whole = chatty.apply_chat_template(messages, tokenize=False)
    assert "".join(part.text for part in rendered.parts) == whole.rstrip("\n")


def test_chat_of_a_prompt_and_a_completion(chatty):
    prompt, completion = render(PAIR, "chat", chatty).parts
    assert prompt.text == "<|begin|><|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"
    assert completion == Part("Four.<|im_end|>", True)


@pytest.mark.parametrize("asks", ["strftime_now('%d %B %Y')", "(strftime_now(format='%Y') if strftime_now is defined)"])
def test_a_template_that_writes_todays_date_writes_the_same_on_every_day(chatty, monkeypatch, caplog, asks):
    chatty.chat_template = "\n{{- 'Today: ' ~ " + asks + " ~ '\n' }}" + chatty.chat_template
    written = set()
    for day in (datetime(2026, 1, 2), datetime(2027, 3, 4)):

        class Clock(datetime):
            @classmethod
            def now(cls, today=day):
                return today

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        direct = chatty.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        assert str(day.year) in direct
        written.add(render(PAIR, "chat", chatty).parts)
    (parts,) = written
    assert parts[0].text.startswith("Today: 26 Jul 2024\n<|begin|>")
    assert caplog.text.count("writes today's date; 26 Jul 2024 is written instead") == 1


def test_a_template_that_writes_no_date_is_left_as_it_is(chatty):
    assert undated(chatty.chat_template, "x") is chatty.chat_template
    kept = chatty.apply_chat_template([{"role": "user", "content": "a"}], chat_template=undated("\nstrftime_now", "x"))
    assert chatty.decode(kept["input_ids"]) == "\nstrftime_now", "the line end that a template begins with stays"


def test_a_template_without_an_end_of_turn_leaves_the_end_to_us(chatty):
    chatty.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rendered = render(PAIR, "chat", chatty)
    assert not rendered.ends and rendered.parts[1] == Part("Four.\n", True)


@pytest.mark.parametrize(("template", "says"), [
    ("{{ raise_exception('roles must alternate') }}", "refuses this row .roles must alternate"),
    ("{{ messages[0]['content'] }}", "leaves message 2 out"),
    ("{{ messages[-1]['content'] }}{{ messages | length }}", "leaves message 2 out or writes what comes before"),
])  # fmt: skip
def test_a_template_that_does_not_separate_prompt_and_answer_is_refused(chatty, template, says):
    chatty.chat_template = template
    refused(DataError, f"^f:1: .*{says}", render, TALK, "chat", chatty)


def joined(pieces):
    return np.concatenate([piece.ids for piece in pieces]).tolist()


@pytest.mark.parametrize("parts", [("the cat", " and the hat"), ("the cat\n", "the hat"), ("€ü", "漢字 😀", "x")])
def test_where_the_border_is_clear_a_row_has_the_tokens_of_its_text(tokenizer, parts):
    (pieces,) = encode_parts([parts], tokenizer)
    assert joined(pieces) == tokenizer("".join(parts))["input_ids"]
    assert [piece.bytes.sum() for piece in pieces] == [len(part.encode()) for part in parts]


@pytest.mark.parametrize("parts", [("the c", "at and"), ("the cat ", "the hat"), ("the cat\n\n", "\nthe hat")])
def test_the_prompt_has_the_tokens_that_generation_starts_from(tokenizer, parts):
    whole = tokenizer("".join(parts))["input_ids"]
    prompt = tokenizer(parts[0])["input_ids"]
    if parts[0] == "the c":
        assert whole[: len(prompt)] != prompt, "one token lies across the border"
    (pieces,) = encode_parts([parts], tokenizer)
    assert pieces[0].ids.tolist() == prompt and tokenizer.decode(joined(pieces)) == "".join(parts)
    assert [piece.bytes.sum() for piece in pieces] == [len(part.encode()) for part in parts]


def test_a_completion_has_no_space_that_only_the_beginning_of_a_text_has():
    """A tokenizer that puts a space before a text (Llama 2) must not put one before a completion."""
    vocabulary = {"<s>": 0, "</s>": 1, "▁a": 2, "▁b": 3, "b": 4, "▁": 5, ":": 6, "<unk>": 7}
    unigram = Tokenizer(models.Unigram([(token, -1.0) for token in vocabulary], unk_id=7))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    unigram.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
    llama = PreTrainedTokenizerFast(tokenizer_object=unigram, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    (pieces,) = encode_parts([("a:", "b")], llama)
    assert [piece.ids.tolist() for piece in pieces] == [[2, 6], [4]]
    assert beginning_of_text(llama) == [0]


def test_bytes_that_no_token_covers_stay_on_their_side_of_the_border():
    made = Tokenizer(models.WordLevel({"one": 0, "two": 1, "<unk>": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # its tokens leave the spaces out
    (pieces,) = encode_parts([("one  ", "two ")], PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"))
    assert [piece.bytes.tolist() for piece in pieces] == [[5], [4]]


def test_a_tokenizer_that_adds_no_beginning_gets_none(tokenizer):
    assert beginning_of_text(tokenizer) == []


TEXTS = ["the cat and the hat", "naïve café, 12 €", "emoji 😀😀 and 漢字かな", "x", "\u0301 combining"]
TEXTS.append(" \n  indented\n\n")


def test_byte_level_tokens_count_their_own_bytes(tokenizer):
    """In byte-level BPE a token's string has one character per byte, which gives the count another way."""
    for text, encoded in zip(TEXTS, encode_texts(TEXTS, tokenizer), strict=True):
        expected = np.array([len(string) for string in tokenizer.convert_ids_to_tokens(encoded.ids.tolist())])
        assert encoded.bytes.sum() == expected.sum() == len(text.encode()) and (encoded.bytes >= 0).all()
        if text.isascii():
            assert encoded.bytes.tolist() == expected.tolist()
        else:  # a character that several tokens share counts for the first of them
            ahead = np.cumsum(encoded.bytes) - np.cumsum(expected)
            assert ahead.min() >= 0 and ahead.max() <= 3
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
    (encoded,) = encode_texts(["One  two \n"], PreTrainedTokenizerFast(tokenizer_object=words))
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
    assert len(encoded.ids) == len(encoded.bytes) and encoded.bytes.sum() == len(text.encode())
    if text.isascii():
        assert set(encoded.bytes.tolist()) == {1}
