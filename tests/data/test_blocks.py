"""Blocks of packed text and rows: order, budget, counts, replayed rows, and where they begin with a token for it."""

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from gaintune.config import DataConfig
from gaintune.data import IGNORED, Examples, replayed_rows, with_replay
from gaintune.data.documents import Passage
from gaintune.data.examples import TokenRow, pack
from gaintune.errors import BaseModelError, ConfigError, DataError
from gaintune.workflows.merge import blocks_of
from support import refused
from support.files import write_rows
from support.tiny_domains import load

TEXTS = [f"document {number}: " + " ".join(f"w{number}x{word}" for word in range(12)) for number in range(120)]


def texts(examples, tokenizer):
    """What stands between the ends of texts in all blocks."""
    return tokenizer.decode(examples.input_ids.flatten()).split(tokenizer.eos_token)


def test_blocks_hold_whole_documents_in_a_drawn_order_with_end_of_text_between(write_rows, tokenizer):
    blocks = load(write_rows("d.jsonl", TEXTS), tokenizer, train_tokens=2048)
    assert blocks.name == "d"
    assert (blocks.train.input_ids.shape, blocks.validation.input_ids.shape) == ((2048 // 64, 64), (2, 64))
    assert blocks.train.input_ids.dtype == blocks.validation.input_ids.dtype == torch.int64
    drawn = texts(blocks.train, tokenizer)
    assert set(drawn[:-1]) <= set(TEXTS), "all but the last, which the budget cuts, are whole"
    assert any(text.startswith(drawn[-1]) for text in TEXTS)
    assert len(drawn) == len(set(drawn)) == blocks.train_documents and drawn != sorted(drawn)
    held_out = texts(blocks.validation, tokenizer)
    assert len(held_out) == blocks.validation_documents and not set(held_out) & set(drawn)


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
    assert "changed" not in held_out and "W1X5" not in held_out
    assert "left 2 validation document(s) out" in caplog.text
    assert f"{tmp_path / 'd' / 'validation.jsonl'}:1" in caplog.text


def test_only_text_that_is_trained_on_counts_as_seen(tmp_path, write_rows, tokenizer):
    write_rows("d/train.jsonl", TEXTS[:100])
    write_rows("d/validation.jsonl", TEXTS[:100])
    blocks = load(tmp_path / "d", tokenizer, train_tokens=256)
    trained_on, held_out = set(texts(blocks.train, tokenizer)), set(texts(blocks.validation, tokenizer))
    assert held_out and not trained_on & held_out


def test_a_domain_smaller_than_its_budget_is_used_up_with_a_warning(write_rows, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "gaintune"):
        blocks = load(write_rows("d.jsonl", TEXTS), tokenizer, train_tokens=10**6)
    tokens = blocks.train.input_ids.numel()
    assert 64 < tokens < 10**6 and f"fewer than the 1000000 asked for; using {tokens}" in caplog.text
    assert blocks.train_documents == len(texts(blocks.train, tokenizer))


def test_documents_beyond_the_last_whole_block_are_not_counted(tmp_path, write_rows, tokenizer):
    write_rows("d/train.jsonl", [f"n{number}" for number in range(100, 200)])
    write_rows("d/validation.jsonl", TEXTS)
    blocks = load(tmp_path / "d", tokenizer, train_tokens=10**4)
    assert blocks.train_documents == len([text for text in texts(blocks.train, tokenizer) if text]) < 100


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


FILLER = 99


def row(number: int, prompt: int, completion: int) -> TokenRow:
    """Tokens number*10, number*10 + 1, ...; every scored token stands for as many bytes as its place in the row."""
    count = prompt + completion
    return TokenRow(np.arange(count) + 10 * number, np.arange(count) >= prompt, np.arange(count), Passage("", number))


def numbers(result):
    return [passage.document for passage in result.passages]


def packed(rows, *, block_size=8, blocks=10, packing=True):
    return pack(iter(rows), block_size=block_size, blocks=blocks, filler=FILLER, packing=packing)


def test_rows_stay_whole_and_in_order_and_positions_start_anew():
    result = packed([row(1, 2, 1), row(2, 1, 2), row(3, 2, 2), row(4, 1, 1)])
    ids = [[10, 11, 12, 20, 21, 22, FILLER, FILLER], [30, 31, 32, 33, 40, 41, FILLER, FILLER]]
    labels = [[-100, -100, 12, -100, 21, 22, -100, -100], [-100, -100, 32, 33, -100, 41, -100, -100]]
    assert (result.examples.input_ids.tolist(), result.examples.labels.tolist()) == (ids, labels)
    assert result.examples.position_ids is not None
    assert result.examples.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 1, 0, 1]]
    assert result.bytes == (2 + 1 + 2, 2 + 3 + 1)
    assert (numbers(result), result.padding, result.cut) == ([1, 2, 3, 4], 4, 0)


def test_without_packing_a_row_has_a_block_of_its_own():
    result = packed([row(1, 2, 1), row(2, 1, 2)], packing=False, block_size=4)
    assert result.examples.input_ids.tolist() == [[10, 11, 12, FILLER], [20, 21, 22, FILLER]]
    assert result.examples.labels.tolist() == [[-100, -100, 12, -100], [-100, 21, 22, -100]]
    assert result.examples.position_ids is None


def test_packing_stops_when_the_blocks_are_full():
    counter = iter(range(1, 10))
    result = packed((row(number, 2, 2) for number in counter), blocks=2)
    assert (numbers(result), result.padding) == ([1, 2, 3, 4], 0)
    assert next(counter) == 6, "of row 5 it is known that it has no room"


def test_a_smaller_budget_is_the_beginning_of_a_larger_one():
    rows = [row(number, 1 + number % 3, 1 + number % 2) for number in range(1, 30)]
    small, large = packed(rows, blocks=3), packed(rows, blocks=6)
    for part in ("input_ids", "labels", "position_ids"):
        assert torch.equal(getattr(small.examples, part), getattr(large.examples, part)[:3])


def test_a_row_longer_than_a_block_is_cut_counted_and_ends_with_its_last_scored_token():
    result = packed([row(1, 3, 7), row(2, 1, 1)])
    assert result.examples.input_ids[0].tolist() == list(range(10, 18))
    assert result.examples.scored == (5, 1) and (result.cut, result.longest) == (1, 10)
    ids = np.arange(12)
    result = packed([TokenRow(ids, np.isin(ids, [3, 10]), ids, Passage("", 0)), row(2, 1, 2)])
    assert result.examples.input_ids[0].tolist() == [0, 1, 2, 3, 20, 21, 22, FILLER]


@pytest.mark.parametrize("prompt", [8, 9, 20])
def test_a_prompt_that_fills_a_block_is_refused(prompt):
    result = packed([row(1, 1, 1), row(2, prompt, 3), row(3, 1, 1)])
    assert [each.passage.document for each in result.refused] == [2] and numbers(result) == [1, 3]
    assert not packed([row(2, 7, 3)]).refused, "one token of the completion is enough"


@pytest.mark.parametrize("packing", [True, False])
def test_every_block_has_something_to_score(packing):
    generator = np.random.default_rng(0)
    rows = [row(n, int(generator.integers(1, 20)), int(generator.integers(1, 20))) for n in range(200)]
    result = packed(rows, block_size=16, blocks=50, packing=packing)
    assert min(result.examples.scored) >= 1 and len(result.examples) == 50


def domain(number: int, rows: int, length: int = 4) -> Examples:
    """Rows whose every token is 1000 * number + row."""
    return Examples.of_blocks((1000 * number + torch.arange(rows)).unsqueeze(1).repeat(1, length))


def firsts(examples: Examples) -> list[int]:
    return examples.input_ids[:, 0].tolist()


@pytest.mark.parametrize(
    ("new", "ratio", "rows"),
    [(10, 0.5, 5), (5, 0.5, 3), (5, 0.1, 1), (4, 0.1, 0), (15, 0.1, 2), (3, 2.0, 6), (7, 0.0, 0)],
)
def test_halves_are_rounded_up(new, ratio, rows):
    assert replayed_rows(new, ratio) == rows


def test_nothing_is_changed_at_ratio_0_or_in_the_first_domain():
    new = domain(9, 5)
    assert with_replay(new, [domain(1, 5)], 0.0, seed=0) is new and with_replay(new, [], 0.5, seed=0) is new


def test_new_rows_are_all_kept_and_earlier_domains_share_evenly():
    new, earlier = domain(9, 10), [domain(1, 50), domain(2, 50), domain(3, 50)]
    mixed = firsts(with_replay(new, earlier, 1.1, seed=0))
    assert mixed[:10] == firsts(new)
    replayed = mixed[10:]
    assert len(replayed) == 11
    assert [sum(token // 1000 == number for token in replayed) for number in (1, 2, 3)] == [4, 4, 3]
    assert len(set(replayed)) == 11


def test_a_small_domain_is_replayed_several_times():
    mixed = firsts(with_replay(domain(9, 8), [domain(1, 3)], 1.0, seed=0))[8:]
    assert {token: mixed.count(token) for token in mixed}.keys() == {1000, 1001, 1002}
    assert max(map(mixed.count, mixed)) - min(map(mixed.count, mixed)) == 1


def test_the_seed_and_the_stage_decide_the_draw():
    def draw(seed, stages=1):
        return firsts(with_replay(domain(9, 10), [domain(1, 100)] * stages, 0.5 * stages, seed))[10:]

    assert draw(0) == draw(0) and draw(0) != draw(1)
    assert draw(0) != draw(0, stages=2)[:5]


def test_text_beside_packed_rows_gets_positions_and_shorter_rows_a_filling_that_is_not_scored():
    packed = Examples(torch.full((2, 6), 7), torch.full((2, 6), IGNORED), torch.tensor([[0, 1, 2, 0, 1, 2]] * 2))
    mixed = with_replay(domain(9, 2), [packed], 0.5, seed=0)
    assert mixed.input_ids.shape == mixed.labels.shape == (3, 6)
    assert mixed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]] * 2 + [[0, 1, 2, 0, 1, 2]]
    assert mixed.labels[:2, :4].tolist() == domain(9, 2).labels.tolist()
    assert (mixed.labels[:2, 4:] == IGNORED).all() and mixed.scored == (3, 3, 0)


BEGIN = "<|begin|>"
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


def test_every_block_begins_with_the_token_and_holds_one_token_of_text_less(text, bare, adding):
    plain, begun = load(text, bare), load(text, adding)
    begin = bare.bos_token_id
    for side in ("train", "validation"):
        before, blocks = getattr(plain, side).input_ids, getattr(begun, side).input_ids
        assert blocks.shape == before.shape
        assert (blocks[:, 0] == begin).all() and not (blocks[:, 1:] == begin).any()
        running = blocks[:, 1:].flatten()
        assert torch.equal(running, before.flatten()[: len(running)]), "nothing of the text is left out"
        assert getattr(begun, side).scored == (63,) * len(blocks)
    assert begun.describe()["beginning_of_text"] == begin and begun.content_hash != plain.content_hash


def test_the_first_token_of_text_is_scored_after_a_beginning(text, adding):
    begun = load(text, adding)
    for block, counted in zip(begun.validation.input_ids, begun.validation_bytes, strict=True):
        strings = adding.convert_ids_to_tokens([t for t in block[1:].tolist() if t != adding.eos_token_id])
        assert counted == sum(map(len, strings)), "ASCII: a token has as many characters as bytes"


def test_a_plan_can_set_the_beginning_of_text_but_not_for_labelled_rows(text, bare, adding):
    wrong = {"task": "classify", "beginning_of_text": "always"}
    refused(ValueError, "beginning_of_text is for text and instructions", DataConfig, **wrong)
    assert same(load(text, bare, beginning_of_text="always"), load(text, adding))
    assert same(load(text, adding, beginning_of_text="never"), load(text, bare))
    assert same(load(text, bare, beginning_of_text="never"), load(text, bare))


def test_without_a_beginning_of_text_nothing_is_recorded_of_it(text, bare):
    plain = load(text, bare)
    assert "beginning_of_text" not in plain.describe() and plain.settings == {}
    assert "beginning_of_text" not in DataConfig().model_dump()
    assert DataConfig(beginning_of_text="never").model_dump()["beginning_of_text"] == "never"


@pytest.mark.parametrize("task", ["text", "instruct"])
def test_always_needs_a_tokenizer_that_has_one(text, rows, tokenizer, task):
    message = r"data\.beginning_of_text is always, but .* no beginning-of-text token"
    source = text if task == "text" else rows
    refused(ConfigError, message, load, source, tokenizer, task=task, beginning_of_text="always")


def test_the_tokens_of_a_side_are_counted_with_the_beginning(tmp_path, adding):
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
        for start, end in pairwise([*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]):
            if (labels[start:end] != -100).any():
                counts.append(int((ids[start:end] == begin).sum()) if ids[start] == begin else 0)
    return counts


@pytest.mark.parametrize(("choice", "count"), [("auto", 1), ("always", 1), ("never", 0)])
@pytest.mark.parametrize("template", ["plain", "chat, written by it", "chat"])
def test_a_row_begins_with_the_token_once(rows, adding, template, choice, count):
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
    assert len(counts) == blocks.train_documents > 2 and set(counts) == {1 if written else count}


def test_a_merge_is_judged_on_blocks_that_begin_with_the_token(bare, adding):
    plain, begun = blocks_of(TEXTS, bare, 64), blocks_of(TEXTS, adding, 64)
    assert (begun[:, 0] == adding.bos_token_id).all()
    running = begun[:, 1:].flatten()
    assert torch.equal(running, plain.flatten()[: len(running)])
    endless = PreTrainedTokenizerFast(tokenizer_object=adding.backend_tokenizer, bos_token=BEGIN)
    refused(ConfigError, "empty", blocks_of, [""], endless)
