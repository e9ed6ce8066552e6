"""Two small domains of real text, cut from the standard library, as a user's .jsonl files."""

import ast
import inspect
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from types import MappingProxyType

from gaintune.config import DataConfig, DomainConfig
from gaintune.data import load_domain
from support.files import write_rows

SIZES = {"train_tokens": 1024, "validation_tokens": 256, "block_size": 32}


def write(folder: Path) -> tuple[Path, Path]:
    """Write prose.jsonl and code.jsonl, and return their paths."""
    prose = [topics[key][:600] for key in sorted(topics)][:40]
    functions = [node for node in ast.walk(ast.parse(inspect.getsource(ast))) if isinstance(node, ast.FunctionDef)]
    code = list(dict.fromkeys(ast.unparse(node)[:600] for node in functions))[:60]
    domains = {"prose.jsonl": prose, "code.jsonl": code}
    return tuple(write_rows(folder / name, [{"text": text} for text in texts]) for name, texts in domains.items())


def load(source: Path, tokenizer, domain: Mapping = MappingProxyType({}), **settings):
    """Load a file or folder as domain 'd' with a small budget; `domain` is what the plan sets on the domain itself."""
    sizes = {"train_tokens": 512, "validation_tokens": 128, "block_size": 64}
    named = DomainConfig(**{"name": "d", "source": str(source), **domain})
    return load_domain(named, DataConfig(domains=(named,), **{**sizes, **settings}), tokenizer)


def of(plan: dict, *names: str, **changes) -> dict:
    """Return the plan over some of its domains, and with other sections."""
    domains = [domain for domain in plan["data"]["domains"] if domain.partition("=")[0] in names]
    return {**plan, "data": {**plan["data"], "domains": domains}, **changes}


def edit(file: Path) -> None:
    """Put other texts in a domain's file."""
    write_rows(file, [{"text": line[10:90]} for line in file.read_text().splitlines()])


def plan(model: Path, folder: Path, /, **changes) -> dict:
    """A plan of seconds over both domains, as nested values."""
    prose, code = write(folder)
    values = {
        "model": {"name": str(model), "dtype": "fp32", "device": "cpu"},
        "data": {"domains": [f"prose={prose}", f"code={code}"], **SIZES},
        "methods": ["gain-ffn"],
        "train": {"checkpoint_steps": 3},
        "evaluate": {"bootstrap_samples": 50},
    }
    for section, fields in changes.items():
        values[section] = {**values[section], **fields} if isinstance(fields, dict) else fields
    return values
