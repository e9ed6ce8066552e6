"""Templates: what the model sees of a row, what of it is scored, and its tokens at the border between the two."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from gaintune.data import beginning_of_text, encode_parts
from gaintune.data.encode import Part, Rendered, render, undated
from gaintune.data.exchanges import Exchange, Turn, question_and_answer
from gaintune.errors import ConfigError, DataError

PAIR = question_and_answer("Two and two?", "Four.")


def chat(*turns, scored=True):
    return Exchange(
        tuple(Turn(role, content, scored=scored and role == "assistant") for role, content in turns), True, "f:1", 1
    )


def test_plain_adds_nothing(tokenizer):
    expected = Rendered((Part("Two and two?", False), Part("Four.", True)))
    assert render(PAIR, "plain", tokenizer) == expected == render(PAIR, "auto", tokenizer)


def test_alpaca(tokenizer):
    prompt, completion = render(PAIR, "alpaca", tokenizer).parts
    assert prompt.text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nTwo and two?\n\n### Response:\n"
    )
    assert completion == Part("Four.", True) and not prompt.scored


def test_magicoder(tokenizer):
    prompt, completion = render(PAIR, "magicoder", tokenizer).parts
    assert prompt.text.startswith("You are an exceptionally intelligent coding assistant")
    assert prompt.text.endswith("\n\n@@ Instruction\nTwo and two?\n\n@@ Response\n")
    assert completion == Part("Four.", True)


def test_braces_in_a_prompt_stay(tokenizer):
    exchange = question_and_answer("print({prompt}) {0} {completion}", "x")
    assert "\nprint({prompt}) {0} {completion}\n" in render(exchange, "alpaca", tokenizer).parts[0].text


def test_a_conversation_fits_only_chat(tokenizer):
    exchange = chat(("system", "Be brief."), ("user", "a"), ("assistant", "b"))
    with pytest.raises(DataError, match=r"^f:1: template 'alpaca' takes one message .* system, user, assistant; use"):
        render(exchange, "alpaca", tokenizer)


def test_messages_of_one_question_fit_a_template(tokenizer):
    assert render(chat(("user", "a"), ("assistant", "b")), "plain", tokenizer).parts == (
        Part("a", False),
        Part("b", True),
    )


def test_chat_scores_every_answer_up_to_its_end_of_turn(chatty):
    exchange = chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    rendered = render(exchange, "auto", chatty)
    assert rendered == Rendered(
        (
            Part(
                "<|begin|><|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
                False,
            ),
            Part("b<|im_end|>", True),
            Part("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", False),
            Part("d<|im_end|>", True),
        ),
        ends=True,
    )
    whole = chatty.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in exchange.turns], tokenize=False
    )
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
    assert not rendered.ends
    assert rendered.parts[1] == Part("Four.\n", True)


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"^data.template: .* has no chat template"):
        render(chat(("user", "a"), ("assistant", "b")), "auto", tokenizer)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses this row .roles must alternate"),
        ("{{ messages[0]['content'] }}", "leaves message 2 out"),
        ("{{ messages[-1]['content'] }}{{ messages | length }}", "leaves message 2 out or writes what comes before"),
    ],
)
def test_a_template_that_prompt_and_answer_cannot_be_told_from_is_refused(chatty, template, says):
    chatty.chat_template = template
    with pytest.raises(DataError, match=says) as caught:
        render(chat(("user", "a"), ("assistant", "b")), "chat", chatty)
    assert str(caught.value).startswith("f:1: ")


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
    assert pieces[0].ids.tolist() == prompt
    assert tokenizer.decode(joined(pieces)) == "".join(parts)
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
    words = {"one": 0, "two": 1, "<unk>": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # its tokens leave the spaces out
    (pieces,) = encode_parts([("one  ", "two ")], PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"))
    assert [piece.bytes.tolist() for piece in pieces] == [[5], [4]]


def test_a_tokenizer_that_adds_no_beginning_gets_none(tokenizer):
    assert beginning_of_text(tokenizer) == []
