"""The same rows through TRL's SFTTrainer: the same tokens, and the same of them scored."""

from __future__ import annotations

import pytest
from datasets import Dataset

from gaintune.data import beginning_of_text
from gaintune.data.blocks import token_rows
from gaintune.data.documents import Passage
from gaintune.data.encode import end_of_text
from gaintune.data.exchanges import Exchange, Turn, question_and_answer
from support import tiny_base

PAIRS = [("Two and two?", " Four."), ("the cat sat\n", "on the mat, € 5"), ("Why {so}?\n\n", "No reason.")]


def trl_rows(rows: list[dict], tokenizer, folder) -> list[tuple[list[int], list[int]]]:
    trl = pytest.importorskip("trl")
    settings = trl.SFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, max_length=None, bf16=False)
    trainer = trl.SFTTrainer(
        model=tiny_base.model(),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
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
        assert chatty.decode(their_ids[len(ids) :]) == "\n", (
            "the new line after the end of turn, which is not generated"
        )
        assert (ids, scored) == (their_ids[: len(ids)], their_scored[: len(ids)])
