"""Files as tests need them: rows of JSON lines, settings that change, whole folders to compare, and damage."""

import json
from collections.abc import Iterable
from pathlib import Path

from gaintune.config import build_plan


def write_rows(file: Path, rows: Iterable[object]) -> Path:
    """Write one JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def as_plan(values: dict) -> dict:
    """Return a plan as plain values, as workflows hand it to a run directory."""
    return build_plan(values).model_dump(mode="json")


def edit_json(file: Path, **changes) -> None:
    """Change some keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def contents(folder: Path, leave_out: set[str] = frozenset()) -> dict[str, bytes]:
    """Return the bytes of every file below a folder by its path, except of files with these names."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in leave_out)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def cut_short(file: Path, count: int = 8) -> bytes:
    """Take the last bytes off a file, and return it as it was."""
    whole = file.read_bytes()
    file.write_bytes(whole[:-count])
    return whole
