"""From an exchange to the text a model sees: the papers' two templates, the model's own chat template, or none."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gaintune.config.plan import Template
from gaintune.data.encode import special_tokens
from gaintune.data.exchanges import Exchange
from gaintune.errors import ConfigError, DataError, one_line

logger = logging.getLogger(__name__)

DATE = "26 Jul 2024"
"""The date of a chat template that asks for today's: what Llama 3 writes where it cannot ask."""

# The formats of Stanford Alpaca (without an input) and of Magicoder, as DISeL uses them (appendix III.1). A completion
# follows "### Response:" on a new line, as the paper prints it.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
MAGICODER = (
    "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable "
    "responses to user instructions.\n\n@@ Instruction\n{prompt}\n\n@@ Response\n"
)


@dataclass(frozen=True)
class Part:
    """A piece of a row's text; scored or seen only."""

    text: str
    scored: bool


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        parts: in order; the first is never scored, the last always.
        begins: whether the text brings its own beginning-of-text token.
        ends: whether the text brings its own end-of-turn token.
    """

    parts: tuple[Part, ...]
    begins: bool = False
    ends: bool = False


def render(exchange: Exchange, template: Template, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Write an exchange in a template.

    `auto` is `chat` for rows of messages and `plain` for a prompt and its completion. `plain` puts the completion
    right after the prompt, adding nothing. `chat` renders what comes before each scored turn as the tokenizer's chat
    template does for generation; what the template adds once the turn is there is scored, up to and including its
    end-of-turn token. Where a template writes today's date, `DATE` stands, so that rows are the same on every day.

    Raises:
        ConfigError: the tokenizer has no chat template.
        DataError: the row does not fit the template, with its file and line.
    """
    if template == "auto":
        template = "chat" if exchange.chat else "plain"
    if template == "chat":
        return _chat(exchange, tokenizer)
    roles = [turn.role for turn in exchange.turns]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"{exchange.origin}: template {template!r} takes one message of the user and one of the assistant, this "
            f"row has {', '.join(roles)}; use template 'chat'"
        )
    prompt, completion = (turn.content for turn in exchange.turns)
    written = {"plain": "{prompt}", "alpaca": ALPACA, "magicoder": MAGICODER}[template].replace("{prompt}", prompt)
    return Rendered((Part(written, scored=False), Part(completion, scored=True)))


def _chat(exchange: Exchange, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"data.template: the tokenizer {tokenizer.name_or_path!r} has no chat template; use a chat model, or "
            f"template plain, alpaca or magicoder with a prompt and a completion"
        )
    messages = [{"role": turn.role, "content": turn.content} for turn in exchange.turns]
    endings = tuple(special_tokens(tokenizer).values())
    parts: list[Part] = []
    written, ends = "", False
    for index, turn in enumerate(exchange.turns):
        if not turn.scored:
            continue
        before = _apply(tokenizer, messages[:index], exchange.origin, add_generation_prompt=True)
        after = _apply(tokenizer, messages[: index + 1], exchange.origin, add_generation_prompt=False)
        if not before.startswith(written) or not after.startswith(before) or not after[len(before) :].strip():
            raise DataError(
                f"{exchange.origin}: the chat template of {tokenizer.name_or_path!r} leaves message {index + 1} out "
                f"or writes what comes before it anew, so that prompt and completion cannot be told apart; make each "
                f"answer a row of its own, or use another template"
            )
        completion = after[len(before) :]
        ends = completion.rstrip().endswith(endings)
        # what a template puts after its end-of-turn token (a new line, often) is never generated: seen, not scored
        learnt = completion.rstrip() if ends else completion
        parts += [Part(before[len(written) :], scored=False), Part(learnt, scored=True)]
        written = before + learnt
    merged = tuple(part for part in parts if part.text)
    return Rendered(merged, begins=True, ends=ends)


def _apply(tokenizer: Any, messages: list[dict[str, str]], origin: str, *, add_generation_prompt: bool) -> str:
    try:
        template = undated(tokenizer.get_chat_template(), str(tokenizer.name_or_path))
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{origin}: the model's chat template refuses this row ({one_line(error)})") from None


@cache  # also so that it is said once
def undated(template: str, tokenizer: str) -> str:
    """A chat template that writes `DATE` where it would ask transformers for today's date, in whatever format."""
    if "strftime_now" not in template:
        return template
    logger.warning(
        "the chat template of %s writes today's date; %s is written instead, so that rows are the same on every day",
        tokenizer, DATE,
    )  # fmt: skip
    # the plus keeps a line end that the template may begin with
    return f"{{% macro strftime_now(format) %}}{DATE}{{% endmacro +%}}{template}"
