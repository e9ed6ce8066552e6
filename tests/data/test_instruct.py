"""A domain of instructions: rows, split, what is scored, budgets and hash, rows as TRL has them, and mistakes."""

import logging
from itertools import pairwise

import pandas
import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError

from gaintune.config import DataConfig, DomainConfig
from gaintune.data import beginning_of_text, load_domain
from gaintune.data.blocks import token_rows
from gaintune.data.documents import Passage
from gaintune.data.domains import load_exchanges
from gaintune.data.encode import end_of_text
from gaintune.data.exchanges import Exchange, Turn, question_and_answer, read_exchanges
from gaintune.errors import ConfigError, DataError
from support import refused, tiny_base, tiny_domains
from support.files import write_rows as write_file

WORDS = ("the", "cat", "and", "the", "hat", "and", "the", "bat", "sat", "on", "the", "mat")
ROWS = [(" ".join(f"{word}{number}" for word in WORDS) + "? ", f"cat {number} sat € {number}") for number in range(150)]


def load(source, tokenizer, domain=(), **changes):
    sizes = {"task": "instruct", "train_tokens": 1024, "validation_tokens": 512, "block_size": 128}
    return tiny_domains.load(source, tokenizer, dict(domain), **{**sizes, **changes})


@pytest.fixture
def write(tmp_path):
    return lambda name, rows=ROWS: write_file(tmp_path / name, ({"prompt": a, "completion": b} for a, b in rows))


def texts(examples, tokenizer):
    """What each row of the blocks says, and what of it is scored, told apart by the positions alone."""
    found = []
    for ids, labels, positions in zip(examples.input_ids, examples.labels, examples.position_ids, strict=True):
        for start, end in pairwise([*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]):
            scored = labels[start:end] != -100
            if scored.any():
                found.append((tokenizer.decode(ids[start:end]), tokenizer.decode(ids[start:end][scored])))
    return found


def test_the_completion_and_its_end_are_scored_and_nothing_else(write, tokenizer):
    blocks, end = load(write("d.jsonl"), tokenizer), tokenizer.eos_token
    rows = {asked + said + end: said + end for asked, said in ROWS}
    for side in (blocks.train, blocks.validation):
        assert side.input_ids.shape[1] == 128
        for text, scored in texts(side, tokenizer):
            assert rows[text] == scored
        assert min(side.scored) > 0
    assert len(texts(blocks.train, tokenizer)) == blocks.train_documents
    assert len(texts(blocks.validation, tokenizer)) == blocks.validation_documents


def test_the_end_of_text_can_be_left_out(write, tokenizer):
    blocks = load(write("d.jsonl"), tokenizer, end_of_text=False)
    rows = {asked + said: said for asked, said in ROWS}
    for side in (blocks.train, blocks.validation):
        for text, scored in texts(side, tokenizer):
            assert rows[text] == scored
    assert blocks.content_hash != load(write("d.jsonl"), tokenizer).content_hash


def test_budgets_are_in_tokens_and_nest_and_sides_are_disjoint(write, tokenizer):
    file = write("d.jsonl")
    small, large = load(file, tokenizer, train_tokens=512), load(file, tokenizer, train_tokens=1100)
    assert (small.train.tokens, large.train.tokens, large.validation.tokens) == (512, 1024, 512)
    assert torch.equal(small.train.input_ids, large.train.input_ids[:4])
    assert torch.equal(small.validation.labels, large.validation.labels)
    train, held_out = (dict(texts(side, tokenizer)) for side in (large.train, large.validation))
    assert not set(train) & set(held_out)
    assert load(file, tokenizer, seed=1).train.input_ids.tolist() != load(file, tokenizer).train.input_ids.tolist()


def test_rows_with_one_question_are_on_one_side(write, tokenizer):
    doubled = [(asked, f"{said} {more}") for asked, said in ROWS[:60] for more in ("a", "b", "c")]
    blocks = load(write("d.jsonl", doubled), tokenizer, train_tokens=10_000)
    sides = (texts(side, tokenizer) for side in (blocks.train, blocks.validation))
    train, validation = ({text.partition("?")[0] for text, _ in side} for side in sides)
    assert validation and not train & validation and blocks.removed_near_duplicates == 0


def test_a_validation_row_with_nearly_a_question_of_training_is_left_out(tmp_path, write, tokenizer, caplog):
    write("d/train.jsonl", ROWS[:20])
    write("d/validation.jsonl", [(ROWS[3][0].upper(), "other"), (ROWS[5][0] + " now", "other"), *ROWS[20:30]])
    with caplog.at_level(logging.INFO, "gaintune"):
        blocks = load(tmp_path / "d", tokenizer, train_tokens=10_000, validation_tokens=10_000)
    assert blocks.train_documents == 20
    assert (blocks.validation_documents, blocks.removed_near_duplicates) == (10, 2)
    assert "near-duplicates of training prompts: " + f"{tmp_path / 'd' / 'validation.jsonl'}:1" in caplog.text


def test_an_instruction_that_all_prompts_share_makes_no_near_duplicates(tmp_path, write, tokenizer):
    shared = "say in a few words and without any doubt what it is that sat on the mat today, and say no more: "
    rows = [(shared + " ".join(f"{word}{number}" for word in WORDS[:6]), "cat") for number in range(40)]
    write("d/train.jsonl", rows[:30])
    write("d/validation.jsonl", [rows[0], *rows[30:]])
    blocks = load(tmp_path / "d", tokenizer, train_tokens=10_000, validation_tokens=10_000, block_size=256)
    assert (blocks.validation_documents, blocks.removed_near_duplicates) == (10, 1)


def test_bytes_are_those_of_the_completions(write, tokenizer):
    rows, blocks = dict(ROWS), load(write("d.jsonl"), tokenizer)
    answered = [rows[text.partition("?")[0] + "? "] for text, _ in texts(blocks.validation, tokenizer)]
    assert sum(blocks.validation_bytes) == sum(len(said.encode()) for said in answered)


def test_chats_are_what_the_chat_template_makes_of_them(tmp_path, chatty):
    roles = ("user", "assistant", "user", "assistant")
    turns = [(asked, said, "why €?", f"so {said}") for asked, said in ROWS]
    chats = [[{"role": a, "content": b} for a, b in zip(roles, chat, strict=True)] for chat in turns]
    blocks = load(write_file(tmp_path / "d.jsonl", ({"messages": chat} for chat in chats)), chatty, block_size=256)
    rendered = {chatty.apply_chat_template(chat, tokenize=False).rstrip("\n"): chat for chat in chats}
    seen = 0
    for text, scored in texts(blocks.validation, chatty):
        _, first, _, second = (message["content"] for message in rendered[text])
        assert scored == f"{first}<|im_end|>{second}<|im_end|>", "each turn has one end, and the template's beginning"
        seen += len((first + second).encode())
    assert sum(blocks.validation_bytes) == seen, "markers stand for no text"


def test_a_beginning_of_text_comes_before_every_row(write, chatty):
    for text, scored in texts(load(write("d.jsonl"), chatty).train, chatty):
        assert text.startswith("<|begin|>") and text.count("<|begin|>") == 1
        assert scored.endswith("<|im_end|>") and "<|begin|>" not in scored


def test_padding_instead_of_packing(write, tokenizer):
    blocks = load(write("d.jsonl"), tokenizer, packing=False)
    assert blocks.train.position_ids is None
    assert (blocks.train_documents, blocks.validation_documents) == (8, 4)
    for ids, labels in zip(blocks.train.input_ids, blocks.train.labels, strict=True):
        last = torch.nonzero(labels != -100).max().item()
        assert ids[last] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[: last + 1]).removesuffix(tokenizer.eos_token) in {a + b for a, b in ROWS}


def test_the_hash_follows_rows_template_and_packing(write, tokenizer):
    file = write("d.jsonl")
    changed = write("e.jsonl", [(asked, said.replace("sat", "lay")) for asked, said in ROWS])
    settings = ({}, {"packing": False}, {"template": "alpaca", "block_size": 512}, {"block_size": 512})
    hashes = [load(file, tokenizer, **each).content_hash for each in settings]
    assert len({*hashes, load(changed, tokenizer).content_hash}) == len(hashes) + 1
    assert load(write("f.jsonl"), tokenizer).content_hash == hashes[0]


def test_a_domain_s_own_template_wins(write, tokenizer):
    blocks = load(write("d.jsonl"), tokenizer, block_size=512, domain={"template": "magicoder"}, template="alpaca")
    assert all("@@ Response\n" in text for text, _ in texts(blocks.train, tokenizer))


def test_rows_without_room_for_the_completion_are_refused_by_number(write, tokenizer):
    rows = [*ROWS[:30], ("the mat " * 100, "cat"), *ROWS[30:40], ("a hat " * 100, "cat")]
    file = write("d.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load(file, tokenizer, train_tokens=10_000, validation_tokens=10_000)
    message = str(caught.value)
    prompts = {line: len(tokenizer(rows[line - 1][0])["input_ids"]) for line in (31, 42)}
    assert any(f":{line} " in message for line in prompts)
    for line, prompt in prompts.items():
        if f":{line} " in message:  # one may be on the validation side, which is not reached
            needed = prompt + len(tokenizer("cat")["input_ids"]) + 1
            assert f"{file}:{line} (row {line}): a prompt of {prompt} tokens, {needed} with its completion" in message
    assert "nothing of the completion is left" in message and "Set data.block_size=" in message
    load(file, tokenizer, train_tokens=10_000, block_size=512)


def test_rows_that_are_cut_are_counted(write, tokenizer, caplog):
    rows = [*ROWS[:30], *((f"{number} " * 9 + "how often?", "the mat " * 100) for number in range(5))]
    file = write("d.jsonl", rows)
    with caplog.at_level(logging.WARNING, "gaintune"):
        blocks = load(file, tokenizer, train_tokens=10_000)
    cut = [text for text, _ in texts(blocks.train, tokenizer) if not text.endswith(tokenizer.eos_token)]
    longest = max(len(tokenizer(asked)["input_ids"]) + len(tokenizer(said)["input_ids"]) + 1 for asked, said in rows)
    count = blocks.train_documents
    assert 1 <= len(cut) <= 5
    assert f"{len(cut)} of {count} training rows are longer than a block of 128 tokens and are cut" in caplog.text
    assert f"the longest has {longest} tokens" in caplog.text


def test_a_domain_smaller_than_its_budget_is_used_up_with_a_warning(write, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "gaintune"):
        blocks = load(write("d.jsonl"), tokenizer, train_tokens=10**6)
    assert f"fills {blocks.train.tokens} tokens, fewer than the 1000000 asked for" in caplog.text


def test_text_and_instructions_go_together_and_other_tasks_are_refused(write, write_rows, tokenizer):
    text = write_rows("prose.jsonl", [f"document {number} " * 30 for number in range(40)])
    questions = DomainConfig(name="questions", source=str(write("d.jsonl")), task="instruct")
    domains = (DomainConfig(name="prose", source=str(text)), questions)
    mixed = DataConfig(domains=domains, train_tokens=512, validation_tokens=128, block_size=128)
    prose, rows = (load_domain(domain, mixed, tokenizer) for domain in domains)
    assert prose.train.position_ids is None and rows.train.position_ids is not None
    refused(ConfigError, "domain 'd' has task classify", load, text, tokenizer, task="classify")


@pytest.mark.parametrize(("changes", "says"), [
    ({"domains": ["a", {"name": "b", "source": "b", "task": "classify"}]}, "cannot be mixed with others: a .text."),
    ({"domains": ["a"], "template": "alpaca"}, "template is for task instruct, and no domain has it"),
    ({"domains": ["a"], "packing": False}, "packing is for task instruct"),
    ({"domains": ["a"], "end_of_text": False}, "end_of_text is for task instruct"),
    ({"domains": [{"name": "a", "source": "a", "template": "chat"}]}, "domains: a: template is for task instruct"),
    ({"domains": [{"name": "a", "source": "a", "prompt_column": "q"}]}, "prompt_column is for task instruct"),
])  # fmt: skip
def test_settings_that_do_not_fit_together_are_refused(changes, says):
    refused(ValidationError, says, DataConfig, **changes)


USER = {"role": "user", "content": "Two and two?"}
ANSWER = {"role": "assistant", "content": "Four."}


def rows_in(path, *rows):
    return write_file(path, rows)


def only(path, **columns) -> Exchange:
    (exchange,) = read_exchanges(path, **columns).train
    return exchange


PROMPTS = [USER, ANSWER, USER]


@pytest.mark.parametrize(("row", "columns", "chat", "scored"), [
    ({"prompt": "Two and two?", "completion": "Four.", "id": 7}, {}, False, [0, 1]),
    ({"q": "Two and two?", "a": "Four.", "messages": "unread"}, {"prompt": "q", "completion": "a"}, False, [0, 1]),
    ({"messages": [{"role": "system", "content": "Be brief."}, *PROMPTS, ANSWER]}, {}, True, [0, 0, 1, 0, 1]),
    ({"prompt": PROMPTS, "completion": [ANSWER]}, {}, True, [0, 0, 0, 1]),
])  # fmt: skip
def test_every_shape_of_a_row_is_read(tmp_path, row, columns, chat, scored):
    """All turns of the assistant are scored in messages, the completion alone where there is one."""
    file = write_file(tmp_path / "a.jsonl", [row])
    exchange = only(file, **columns)
    assert (exchange.chat, exchange.origin, exchange.row) == (chat, f"{file}:1", 1)
    assert [turn.scored for turn in exchange.turns] == [bool(each) for each in scored]
    assert {(turn.role, turn.content) for turn in exchange.turns if turn.scored} == {("assistant", "Four.")}
    assert exchange.turns[-2] == Turn("user", "Two and two?")
    assert exchange.question == "\n".join(["Two and two?"] * (len(scored) // 2)), "what rows share is no question"


def test_csv_and_parquet(tmp_path):
    rows = pandas.DataFrame({"prompt": ["a?", "b?"], "completion": ["a", "b"]})
    rows.to_csv(tmp_path / "a.csv", index=False)
    rows.to_parquet(tmp_path / "b.parquet")
    first, second = read_exchanges(tmp_path / "a.csv").train, read_exchanges(tmp_path / "b.parquet").train
    assert [each.turns for each in first] == [each.turns for each in second]
    assert second[1].origin == f"{tmp_path / 'b.parquet'}: row 2" and second[1].row == 2


def test_messages_from_parquet_may_hold_nulls(tmp_path):
    rows = pandas.DataFrame({"messages": [[{**USER, "name": None}, {**ANSWER, "name": None}]]})
    rows.to_parquet(tmp_path / "a.parquet")
    assert [turn.role for turn in only(tmp_path / "a.parquet").turns] == ["user", "assistant"]


def test_a_folder_brings_its_own_split(tmp_path):
    for side, letter in (("train", "a"), ("validation", "b"), ("test", "c")):
        rows_in(tmp_path / f"{side}.jsonl", {"prompt": f"{letter}?", "completion": letter})
    rows = read_exchanges(tmp_path)
    assert [row.question for row in rows.train] == ["a?"] and [row.question for row in rows.validation] == ["b?"]


@pytest.mark.parametrize(("row", "says"), [
    ({"prompt": "a"}, "has no column 'completion'; the columns are prompt; name them with prompt_column"),
    ({"question": "a", "answer": "b"}, "has no column 'prompt'; the columns are question, answer"),
    ({"prompt": " ", "completion": "b"}, "column 'prompt' is empty"),
    ({"prompt": "a", "completion": ""}, "column 'completion' is empty"),
    ({"prompt": "a", "completion": None}, "column 'completion' is null, expected text"),
    ({"prompt": 1, "completion": "b"}, "column 'prompt' is of type int, expected text"),
    ({"prompt": "a", "completion": "\ud800"}, "column 'completion' holds half of a surrogate pair"),
    ({"prompt": "a", "completion": [ANSWER]}, "must both be text or both lists of messages"),
    ({"prompt": "a", "completion": "b", "messages": [USER, ANSWER]}, "'messages' and also 'prompt'"),
    ({"messages": "a"}, "messages is of type str, expected a list of messages"),
    ({"messages": []}, "messages is empty"),
    ({"messages": ["a"]}, "message 1 of messages is of type str, expected a mapping of role and content"),
    ({"messages": [{"content": "a"}, ANSWER]}, "message 1 of messages has no 'role'; its keys are content"),
    ({"messages": [USER, {"role": "assistant"}]}, "message 2 of messages has no 'content'"),
    ({"messages": [{"role": "human", "content": "a"}]}, "has the role 'human', expected one of system, user, ass"),
    ({"messages": [{"role": "user", "content": [1]}]}, "message 1 of messages is of type list, expected text"),
    ({"messages": [USER, {**ANSWER, "content": " "}]}, "message 2 of messages is empty"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [1]}]}, "message 2 of messages has 'tool_calls'"),
    ({"messages": [USER, USER]}, "no message of the assistant"),
    ({"messages": [USER, ANSWER, USER]}, "the last message is the user's, and nothing answers it"),
    ({"messages": [ANSWER]}, "the first message is the assistant's, and nothing asks for it"),
    ({"prompt": [], "completion": [ANSWER]}, "column 'prompt' is empty"),
    ({"prompt": [USER], "completion": [USER]}, "no message of the assistant"),
])  # fmt: skip
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, row, says):
    good = {"prompt": "a", "completion": "b"}
    file = rows_in(tmp_path / "a.jsonl", good, good, row)
    with pytest.raises(DataError, match=says) as caught:
        list(read_exchanges(file).train)
    message = str(caught.value)
    assert message.startswith(f"{file}:3: ") and "\n" not in message


def test_text_files_are_no_rows(tmp_path):
    (tmp_path / "a.txt").write_text("prose")
    refused(DataError, r"ends in one of \.jsonl, \.json, \.csv, \.parquet$", read_exchanges, tmp_path / "a.txt")


@pytest.mark.parametrize(("domain", "says"), [
    ({"source": "law"}, r"'law' is for task text, and the plan says instruct; set task: text on the domain"),
    ({"source": "gsm8q"}, "gsm8q is no file, folder or catalogue name; did you mean 'gsm8k'"),
    ({"source": "gsm8k", "prompt_column": "q"}, "'gsm8k' brings its own"),
    ({"source": "x.jsonl", "text_column": "q"}, "text_column is for task text"),
])  # fmt: skip
def test_a_domain_of_another_kind_is_refused(domain, says):
    refused(DataError, says, load_exchanges, DomainConfig(name="d", **domain))


PAIRS = [("Two and two?", " Four."), ("the cat sat\n", "on the mat, € 5"), ("Why {so}?\n\n", "No reason.")]


def trl_rows(rows: list[dict], tokenizer, folder) -> list[tuple[list[int], list[int]]]:
    trl = pytest.importorskip("trl")
    settings = trl.SFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, max_length=None, bf16=False)
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    trainer = trl.SFTTrainer(model=tiny_base.model(), args=settings, **data)
    return [(row["input_ids"], [int(label != -100) for label in row["labels"]]) for row in trainer.train_dataset]


def our_rows(exchanges: list[Exchange], tokenizer) -> list[tuple[list[int], list[int]]]:
    passages = (Passage(exchange.question, number) for number, exchange in enumerate(exchanges))
    rows = token_rows(exchanges, passages, "auto", tokenizer, beginning_of_text(tokenizer), [end_of_text(tokenizer)])
    return [(row.ids.tolist(), row.scored.astype(int).tolist()) for row in rows]


def test_prompts_and_completions(tmp_path):
    tokenizer = tiny_base.tokenizer()
    theirs = trl_rows([{"prompt": asked, "completion": said} for asked, said in PAIRS], tokenizer, tmp_path)
    assert our_rows([question_and_answer(*pair) for pair in PAIRS], tokenizer) == theirs


def test_conversational_prompts_and_completions(chatty, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": said}]}
        for asked, said in PAIRS
    ]
    theirs = trl_rows(rows, chatty, tmp_path)
    ours = our_rows([Exchange((Turn("user", a), Turn("assistant", b, True)), True) for a, b in PAIRS], chatty)
    for (ids, scored), (their_ids, their_scored) in zip(ours, theirs, strict=True):
        assert chatty.decode(their_ids[len(ids) :]) == "\n", "the line end after a turn, which is not generated"
        assert (ids, scored) == (their_ids[: len(ids)], their_scored[: len(ids)])
