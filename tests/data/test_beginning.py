"""The beginning-of-text token: starts every block and row where a model was trained with one, and nothing else."""

from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from gaintune.config import DataConfig
from gaintune.errors import ConfigError, DataError
from gaintune.workflows.merge import blocks_of
from support import refused, write_rows
from support.tiny_domains import load

BEGIN = "<|begin|>"
TEXTS = [f"document {number}: " + " ".join(f"w{number}x{word}" for word in range(12)) for number in range(120)]
ROWS = [(f"What is {number} and {number}?\n", f"It is {2 * number}.") for number in range(150)]


@pytest.fixture
def bare(tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer that knows a beginning-of-text token and does not put it before a text, as SmolLM2's."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token=BEGIN)


@pytest.fixture
def adding(bare) -> PreTrainedTokenizerFast:
    """The same tokens, with the beginning put before every text, as Llama's and Gemma's do."""
    backend = Tokenizer.from_str(bare.backend_tokenizer.to_str())
    token = (BEGIN, bare.bos_token_id)
    backend.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", f"{BEGIN} $A $B", [token])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token=BEGIN)


@pytest.fixture
def text(tmp_path):
    return write_rows(tmp_path / "text.jsonl", ({"text": text} for text in TEXTS))


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ({"prompt": asked, "completion": said} for asked, said in ROWS))


def same(ours, theirs) -> bool:
    sides = [(getattr(ours, side), getattr(theirs, side)) for side in ("train", "validation")]
    return ours.content_hash == theirs.content_hash and all(torch.equal(a.input_ids, b.input_ids) for a, b in sides)


def test_every_block_begins_with_it_and_holds_one_token_of_text_less(text, bare, adding):
    plain, begun = load(text, bare), load(text, adding)
    begin = bare.bos_token_id
    for side in ("train", "validation"):
        before, blocks = getattr(plain, side).input_ids, getattr(begun, side).input_ids
        assert blocks.shape == before.shape
        assert (blocks[:, 0] == begin).all() and not (blocks[:, 1:] == begin).any()
        running = blocks[:, 1:].flatten()
        assert torch.equal(running, before.flatten()[: len(running)]), "nothing of the text is left out"
        assert getattr(begun, side).scored == (63,) * len(blocks)
    assert begun.describe()["beginning_of_text"] == begin
    assert begun.content_hash != plain.content_hash


def test_the_first_token_of_text_is_scored_then(text, adding):
    begun = load(text, adding)
    for block, counted in zip(begun.validation.input_ids, begun.validation_bytes, strict=True):
        strings = adding.convert_ids_to_tokens([t for t in block[1:].tolist() if t != adding.eos_token_id])
        assert counted == sum(map(len, strings)), "ASCII: a token has as many characters as bytes"


def test_a_plan_can_choose_it_or_leave_it_out(text, bare, adding):
    assert same(load(text, bare, beginning_of_text="always"), load(text, adding))
    assert same(load(text, adding, beginning_of_text="never"), load(text, bare))
    assert same(load(text, bare, beginning_of_text="never"), load(text, bare))


def test_without_one_nothing_is_recorded_that_was_not_before(text, bare):
    plain = load(text, bare)
    assert "beginning_of_text" not in plain.describe()
    assert plain.settings == {}
    assert "beginning_of_text" not in DataConfig().model_dump()
    assert DataConfig(beginning_of_text="never").model_dump()["beginning_of_text"] == "never"


@pytest.mark.parametrize("task", ["text", "instruct"])
def test_always_needs_a_tokenizer_that_has_one(text, rows, tokenizer, task):
    message = r"data\.beginning_of_text is always, but .* no beginning-of-text token"
    source = text if task == "text" else rows
    refused(ConfigError, message, load, source, tokenizer, task=task, beginning_of_text="always")


def test_labelled_rows_take_no_choice():
    wrong = {"task": "classify", "beginning_of_text": "always"}
    refused(ValueError, "beginning_of_text is for text and instructions", DataConfig, **wrong)


def test_the_tokens_at_hand_are_counted_with_it(tmp_path, adding):
    for side, texts in (("train", ["the cat"]), ("validation", TEXTS)):
        write_rows(tmp_path / f"{side}.jsonl", ({"text": text} for text in texts))
    count = len(adding("the cat")["input_ids"])
    refused(DataError, f"the training part holds {count} tokens, fewer than one block of 64", load, tmp_path, adding)
    blocks = load(tmp_path, adding, block_size=8, train_tokens=8, validation_tokens=8) if count >= 8 else None
    assert blocks is None or blocks.train.input_ids.shape == (1, 8)


def begun(examples, begin: int) -> list[int]:
    """How often the token stands in each row of the blocks; a row that does not begin with it is an error."""
    counts = []
    for ids, labels, positions in zip(examples.input_ids, examples.labels, examples.position_ids, strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for start, end in pairwise(starts):
            if (labels[start:end] != -100).any():
                counts.append(int((ids[start:end] == begin).sum()) if ids[start] == begin else 0)
    return counts


@pytest.mark.parametrize(("choice", "count"), [("auto", 1), ("always", 1), ("never", 0)])
@pytest.mark.parametrize("template", ["plain", "chat, written by it", "chat"])
def test_a_row_begins_with_it_once(rows, adding, template, choice, count):
    """Also in a chat template that leaves it out; what a chat template writes stays in any case."""
    written = "{{ bos_token }}" if "written" in template else ""
    adding.chat_template = (
        written + "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
        "{{ eos_token if message['role'] == 'assistant' else '' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    kind = {"task": "instruct", "template": template[:5].rstrip(",")}
    blocks = load(rows, adding, **kind, beginning_of_text=choice, block_size=128)
    counts = begun(blocks.train, adding.bos_token_id)
    assert len(counts) == blocks.train_documents > 2
    assert set(counts) == {1 if written else count}


def test_a_merge_is_judged_on_blocks_that_begin_with_it(bare, adding):
    plain, begun = blocks_of(TEXTS, bare, 64), blocks_of(TEXTS, adding, 64)
    assert (begun[:, 0] == adding.bos_token_id).all()
    running = begun[:, 1:].flatten()
    assert torch.equal(running, plain.flatten()[: len(running)])
    endless = PreTrainedTokenizerFast(tokenizer_object=adding.backend_tokenizer, bos_token=BEGIN)
    refused(ConfigError, "empty", blocks_of, [""], endless)
