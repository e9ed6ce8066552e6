"""Write what a smoke run computes on: a base of a few thousand random weights, and texts of the standard library."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gaintune.storage import complete_folder, damage, write_text

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
END = "<end>"
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def base(folder: Path, seed: int = 0) -> Path:
    """Write a Llama of three layers, one for each third of the depth, unless it is there; return the folder."""
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.LlamaConfig(
        vocab_size=300, num_hidden_layers=3, num_key_value_heads=2, max_position_embeddings=512, **SIZES, **ids
    )

    def tokenizer() -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_object=_byte_tokenizer([END]), eos_token=END, bos_token=END)

    return _write_model(folder, seed, lambda: transformers.LlamaForCausalLM(config), tokenizer)


def encoder(folder: Path, seed: int = 0) -> Path:
    """Write a RoBERTa with its masked-LM head, unless it is there; return the folder."""
    ids: dict[str, Any] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    sizes = {"vocab_size": len(SPECIAL) + 256, "num_hidden_layers": 2, **SIZES}
    config = transformers.RobertaConfig(max_position_embeddings=514, type_vocab_size=1, **sizes, **ids)

    def tokenizer() -> PreTrainedTokenizerFast:
        made = _byte_tokenizer(SPECIAL)
        made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), SPECIAL, strict=True))
        return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **names)

    return _write_model(folder, seed, lambda: transformers.RobertaForMaskedLM(config), tokenizer)


def _byte_tokenizer(special: Sequence[str]) -> Tokenizer:
    """Make a tokenizer of special tokens, numbered from 0, and then every byte."""
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _write_model(
    folder: Path, seed: int, make: Callable[[], PreTrainedModel], tokenizer: Callable[[], PreTrainedTokenizerFast]
) -> Path:
    if folder.is_dir() and damage(folder) is None:
        return folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    with complete_folder(folder, ours=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer().save_pretrained(temporary)
    return folder


DOCUMENTS = 64
LONGEST = 400  # characters of a document
MODULES = {
    "pubmedqa": "argparse",
    "wikitext": "typing",
    "finphrase": "_pydecimal",
    "pg19": "email.message",
    "medqa": "ftplib",
    "lambada": "logging",
    "sst2": "pathlib",
    "hellaswag": "unittest.mock",
}
"""The module whose functions replace a paper's domain."""


def texts(folder: Path) -> Path:
    """Write a domain for each of the papers' names, prompts with completions, and rows to classify and to ask."""
    for name, module in MODULES.items():
        _write(folder / f"{name}.jsonl", [{"text": text} for _, text in _functions(module)])
    exchanges = [
        {"prompt": f"What does {name} do?", "completion": f" {text[:120]}"} for name, text in _functions("ast")
    ]
    for name in ("metamathqa", "magicoder"):
        _write(folder / f"{name}.jsonl", exchanges)
    for name, rows in benchmark_rows().items():
        _write(folder / "benchmarks" / f"{name}.jsonl", rows)
        if name in ("gsm8k", "humaneval"):
            _write(folder / f"{name}.jsonl", rows)
    for name, rows in _labelled_rows():
        _write(folder / name / "train.jsonl", rows[:TRAIN_ROWS])
        _write(folder / name / "validation.jsonl", rows[TRAIN_ROWS:])
    return folder


@functools.cache
def _functions(module: str) -> tuple[tuple[str, str], ...]:
    """Return name and source of at most `DOCUMENTS` functions of a module, without duplicates."""
    names: dict[str, str] = {}
    for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(module)))):
        if isinstance(node, ast.FunctionDef) and len(names) < DOCUMENTS:
            names.setdefault(ast.unparse(node)[:LONGEST], node.name)
    return tuple((name, text) for text, name in names.items())


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if not path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


GLUE_LABELS = {"cola": 2, "mnli": 3, "mrpc": 2, "qnli": 2, "sst2": 2}
PAIRS = ("mnli", "mrpc", "qnli")
LETTERS = ("aab", "ooc", "eed")  # a row's text repeats its label's letters: a rule that a few weights can learn
TRAIN_ROWS, VALIDATION_ROWS = 32, 12


def _labelled_rows() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the folder and rows of every labelled set, and of every set of questions in the columns of the Hub."""
    for seed, (name, labels) in enumerate(GLUE_LABELS.items()):
        second = "as above" if name in PAIRS else None
        yield f"glue/{name}", [{"text_a": text, "text_b": second, "label": n} for text, n in _ruled(labels, seed)]
    for seed, (name, labels) in enumerate((("finphrase", 3), ("sst2", 2)), start=10):
        yield f"questions/{name}", [{"sentence": text, "label": label} for text, label in _ruled(labels, seed)]
    options = {"A": "one", "B": "two", "C": "both", "D": "none"}
    medqa = [{"question": text, "options": options, "answer_idx": "ABCD"[label]} for text, label in _ruled(3, 12)]
    yield "questions/medqa", medqa
    question, answers = "Does it help?", ("yes", "no", "maybe")
    pubmedqa = [
        {"question": question, "context": {"contexts": [text], "labels": ["RESULTS"]}, "final_decision": answers[n]}
        for text, n in _ruled(3, 13)
    ]
    yield "questions/pubmedqa", pubmedqa


def _ruled(labels: int, seed: int) -> Iterator[tuple[str, int]]:
    """Yield texts and their labels, every label equally often."""
    generator = random.Random(seed)
    for number in range(TRAIN_ROWS + VALIDATION_ROWS):
        label = number % labels
        yield "".join(generator.choice(LETTERS[label]) for _ in range(12)), label


ROWS = 4
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def benchmark_rows() -> dict[str, list[dict[str, Any]]]:
    """Return questions by the benchmark's name, in a form that `gaintune.evaluate.benchmarks.rows` reads."""
    questions = [f"Question: What comes after {name}?\nAnswer:" for name in NAMES[:ROWS]]
    four_choices = [_choice(question, n, 4) for n, question in enumerate(questions)]
    rows: dict[str, Any] = dict.fromkeys(("arc_easy", "arc_challenge", "openbookqa", "mmlu"), four_choices)
    rows["commonsense_qa"] = [_choice(question, n, 5) for n, question in enumerate(questions)]
    rows["hellaswag"] = [_choice(f"{NAMES[n]}, and after that comes", n, 4) for n in range(ROWS)]
    rows["piqa"] = [_choice(f"Goal: count on from {NAMES[n]}\nAnswer:", n, 2) for n in range(ROWS)]
    rows["winogrande"] = [_choice(f"After {NAMES[n]} comes _ in order.", n, 2) for n in range(ROWS)]
    rows["sciq"] = [_choice(question, 3, 4) for question in questions]
    rows["boolq"] = [
        {
            "query": f"After {NAMES[n]} comes {NAMES[n + 1]}.\nQuestion: does {NAMES[n + n % 2]} come first?\nAnswer:",
            "choices": ["no", "yes"],
            "gold": 1 - n % 2,
        }
        for n in range(ROWS)
    ]
    rows["medqa_4options"] = [
        {
            "question": f"What comes after {NAMES[n]}?",
            "options": dict(zip("ABCD", row["choices"], strict=True)),
            "answer_idx": "ABCD"[n % 4],
        }
        for n, row in enumerate(four_choices)
    ]
    rows["lambada_openai"] = [{"text": f"{', '.join(NAMES[n : n + 3])}, {NAMES[n + 3]}"} for n in range(ROWS)]
    rows["gsm8k"] = [
        {"prompt": f"What is {n} and {n}?", "completion": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(24)
    ]
    rows["triviaqa"] = [
        {"question": f"What comes after {NAMES[n]}?", "answer": {"value": NAMES[n + 1], "aliases": [NAMES[n + 1]]}}
        for n in range(ROWS)
    ]
    rows["nq_open"] = [{"question": f"what comes after {NAMES[n]}", "answer": [NAMES[n + 1]]} for n in range(ROWS)]
    rows["humaneval"] = [
        {
            "task_id": f"Tiny/{n}",
            "prompt": f'def add_{n}(x: int) -> int:\n    """Add {n}."""\n',
            "entry_point": f"add_{n}",
            "canonical_solution": f"    return x + {n}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {1 + n}\n",
        }
        for n in range(24)
    ]
    return rows


def _choice(query: str, number: int, choices: int) -> dict[str, Any]:
    """Make a question whose right answer has the question's number among the choices."""
    gold = number % choices
    return {"query": query, "choices": [NAMES[(number + 1 + n - gold) % 10] for n in range(choices)], "gold": gold}
