"""A base of a few thousand random weights and texts of the standard library: what a smoke run computes on."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gaintune.recipes import tiny_benchmarks, tiny_labels
from gaintune.recipes.tiny_models import byte_tokenizer, write_model
from gaintune.storage.run import write_text

END = "<end>"
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
"""Whose functions stand for a paper's domain."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and one that begins and ends a text."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer([END]), eos_token=END, bos_token=END)


def base(folder: Path, seed: int = 0) -> Path:
    """Write a base, unless it is there."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,  # one for each depth third
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    return write_model(folder, seed, lambda: LlamaForCausalLM(config), tokenizer)


def texts(folder: Path) -> Path:
    """Write a domain for each of the papers' names, prompts with completions, and rows to classify and to ask."""
    for name, module in MODULES.items():
        documents = [{"text": text} for _, text in _functions(module)]
        _write(folder / f"{name}.jsonl", documents)
    exchanges = [
        {"prompt": f"What does {name} do?", "completion": f" {text[:120]}"} for name, text in _functions("ast")
    ]
    for name in ("metamathqa", "magicoder"):
        _write(folder / f"{name}.jsonl", exchanges)
    for name, rows in tiny_benchmarks.rows().items():
        _write(folder / "benchmarks" / f"{name}.jsonl", rows)
    for name in ("gsm8k", "humaneval"):
        _write(folder / f"{name}.jsonl", tiny_benchmarks.rows()[name])
    return tiny_labels.write(folder)


@functools.cache
def _functions(module: str) -> tuple[tuple[str, str], ...]:
    """Name and source of functions of a module of the standard library, as many as are wanted, each once."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and len(found) < DOCUMENTS:
            found.setdefault(ast.unparse(node)[:LONGEST], node.name)
    return tuple((name, text) for text, name in found.items())


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if not path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
