"""The analyses, by name. To add one: its folder (see `base.py`), and the folder's name in `FOLDERS`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from gaintune.analysis.base import Analysis
from gaintune.errors import RunDirectoryError
from gaintune.storage import canonical_json, strangers

FOLDERS = ("gates", "linear_model", "gains", "subspace", "tokens", "landscape", "transfer", "retention")


def _analysis_in(folder: str) -> Analysis:
    """Make the analysis whose class stands in a folder's `__init__.py`."""
    module = import_module(f"gaintune.analysis.{folder}")
    classes = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Analysis))
    return next(found() for found in classes if found is not Analysis)


ANALYSES: dict[str, Analysis] = {analysis.name: analysis for analysis in map(_analysis_in, FOLDERS)}


def check_output(folder: Path, analysis: str) -> Path:
    """Return a folder for an analysis's tables; RunDirectoryError if it is a file or holds what no analysis wrote."""
    if not folder.exists():
        return folder
    if not folder.is_dir():
        raise RunDirectoryError(f"{folder} is a file; name a folder for tables and figures")
    if (stranger := next(strangers(folder, _written(folder, analysis)), None)) is not None:
        raise RunDirectoryError(
            f"{folder} is not empty, and no analysis wrote {stranger}; name another folder for tables and figures"
        )
    return folder


def _written(folder: Path, analysis: str) -> Iterator[str]:
    """Yield the file names of the analyses whose record lies in a folder."""
    yield "measured/*.json"  # where retention stores losses, so that it can be resumed
    for name in {**ANALYSES, analysis: None}:
        record = folder / f"{name}.json"
        with contextlib.suppress(OSError, ValueError):
            text = record.read_text(encoding="utf-8")
            if text == canonical_json(json.loads(text)):
                yield from (record.name, f"{name}.md")
                for kind in ("csv", "png", "svg"):
                    yield from (f"{name}.{kind}", f"{name}-*.{kind}", f"{name.removesuffix('s')}-*.{kind}")
