"""What a smoke run classifies with: a tiny encoder, labelled rows under GLUE's names, and questions with choices."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from gaintune.recipes.tiny_models import byte_tokenizer, write_model
from gaintune.storage.run import write_text

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
GLUE_LABELS = {"cola": 2, "mnli": 3, "mrpc": 2, "qnli": 2, "sst2": 2}
PAIRS = ("mnli", "mrpc", "qnli")
LETTERS = ("aab", "ooc", "eed")
"""What a row's text is full of, by its label: a rule that a few weights can learn."""
TRAIN_ROWS, VALIDATION_ROWS = 32, 12


def encoder(folder: Path, seed: int = 0) -> Path:
    """Write a RoBERTa with its masked-LM head, unless it is there."""
    config = RobertaConfig(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=514,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    return write_model(folder, seed, lambda: RobertaForMaskedLM(config), tokenizer)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with RoBERTa's special ones around a text and between two."""
    made = byte_tokenizer(SPECIAL)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **names)


def write(folder: Path) -> Path:
    """Write rows with labels into `glue/` and questions into `questions/`; what is there is kept."""
    for seed, (name, labels) in enumerate(GLUE_LABELS.items()):
        rows = [
            {"text_a": text, "text_b": "as above" if name in PAIRS else None, "label": label}
            for text, label in _ruled(labels, seed)
        ]
        _write_sides(folder / "glue" / name, rows)
    for name, rows in _questions():
        _write_sides(folder / "questions" / name, rows)
    return folder


def _questions() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The papers' sets in the columns of the Hub."""
    for seed, (name, labels) in enumerate((("finphrase", 3), ("sst2", 2)), start=10):
        yield name, [{"sentence": text, "label": label} for text, label in _ruled(labels, seed)]
    yield (
        "medqa",
        [
            {
                "question": text,
                "options": {"A": "one", "B": "two", "C": "both", "D": "none"},
                "answer_idx": "ABCD"[label],
            }
            for text, label in _ruled(3, 12)
        ],
    )
    yield (
        "pubmedqa",
        [
            {
                "question": "Does it help?",
                "context": {"contexts": [text], "labels": ["RESULTS"]},
                "final_decision": ("yes", "no", "maybe")[label],
            }
            for text, label in _ruled(3, 13)
        ],
    )


def _ruled(labels: int, seed: int) -> Iterator[tuple[str, int]]:
    """Texts and their labels, each label as often as another."""
    generator = random.Random(seed)
    for number in range(TRAIN_ROWS + VALIDATION_ROWS):
        label = number % labels
        yield "".join(generator.choice(LETTERS[label]) for _ in range(12)), label


def _write_sides(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    for name, side in (("train", rows[:TRAIN_ROWS]), ("validation", rows[TRAIN_ROWS:])):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            write_text(path, "".join(json.dumps(row) + "\n" for row in side))
