"""What this program may delete or replace: folders it began, and in them the files with its own names.

A new folder gets a marker, `run.json`, which names its kind. A folder without a marker is taken only if it is empty, or
if an earlier version wrote everything in it. Links are never followed and never ours.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gaintune.errors import RunDirectoryError

MARKER = "run.json"
LOCK = ".lock"
MANIFEST = "manifest.json"
UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{12}")  # not yet renamed when a process was killed


@dataclass(frozen=True)
class Kind:
    """A kind of folder that this program begins and continues.

    `name` is in the marker and `noun` in messages. `names` are what such a folder may hold: paths with wildcards, with
    `**` at the end for everything below. `begun` is what it always holds, also if an earlier version began it without a
    marker.
    """

    name: str
    noun: str
    begun: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def marker(self) -> dict[str, Any]:
        """The content of the marker."""
        return {"format": 1, "kind": self.name, "program": "gaintune"}


CHECKPOINTS = "checkpoints/checkpoint-[0-9]*/**"
SNAPSHOTS = "snapshots/step-[0-9]*/**"
TAKING = (LOCK, MARKER, "plan.yaml", "environment.json", "inputs.json", "events.jsonl")
SEQUENCE = Kind(
    "sequence", "run", ("plan.yaml", "environment.json"), (
        *TAKING, "matrix.json", "matrix.csv", "matrix.md", "report.html", "figures/*.png", "figures/*.svg",
        "base/*/*.json", "stages/*/*/training.json", "stages/*/*/metrics.json", "stages/*/*/evaluations/*.json",
        "stages/*/*/adapter/**", "stages/*/*/tensorboard/**", f"stages/*/*/{CHECKPOINTS}", f"stages/*/*/{SNAPSHOTS}",
    ),
)  # fmt: skip
ADAPTATION = Kind("adaptation", "unfinished adaptation", SEQUENCE.begun, (*TAKING, CHECKPOINTS, SNAPSHOTS))
SWEEP = Kind(
    "sweep", "sweep", ("grid.yaml", "outcomes"), (
        LOCK, MARKER, "grid.yaml", "sweep.csv", "sweep.parquet", "cells.csv", "cells.parquet", "comparison.md",
        "comparison.json", "tradeoff.png", "tradeoff.svg", "runs.md", "outcomes/*.json", "base/*.json", "base/.*.lock",
        *(f"runs/{'[0-9a-f]' * 16}/{name}" for name in SEQUENCE.names),
    ),
)  # fmt: skip
KINDS = (SEQUENCE, ADAPTATION, SWEEP)


def kind_of(folder: Path) -> Kind | None:
    """Return the kind of folder that a marker says this is; None without a marker of ours."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return next((kind for kind in KINDS if kind.marker == marker), None)


def check_folder(folder: Path, kind: Kind) -> None:
    """Refuse a folder that is neither new nor of this kind; nothing in it is touched.

    Raises:
        RunDirectoryError: it is a file, a folder of another kind, or holds what this program did not write.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunDirectoryError(f"{folder} is a file; name a folder for the {kind.noun}")
    marked = kind_of(folder)
    if marked is not None and marked != kind:
        raise RunDirectoryError(f"{folder} is a {marked.noun}, not a {kind.noun}: name another folder")
    if marked is not None or not _holds_more_than_a_lock(folder):
        return
    if missing := [name for name in kind.begun if not (folder / name).exists()]:
        raise RunDirectoryError(
            f"{folder} is not empty and has no {missing[0]}, so it is not a {kind.noun}; name another folder"
        )
    if stranger := MARKER if (folder / MARKER).exists() else next(strangers(folder, kind.names), None):
        raise RunDirectoryError(
            f"{folder} is not a {kind.noun}: it holds {stranger}, which no {kind.noun} wrote; name another folder"
        )


def check_replaceable(folder: Path, *, ours: bool = False) -> None:
    """Refuse to replace a folder that was not written whole by this program, file by file.

    Raises:
        RunDirectoryError: it is a link or a file, has no readable manifest, or holds what its manifest does not list.
    """
    if folder.is_symlink():
        raise RunDirectoryError(f"{folder} is a link; name the folder itself, or delete the link")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunDirectoryError(f"{folder} is a file; name a folder, or delete it if it is no longer wanted")
    listed = _listed(folder)
    if listed is None and not ours and any(folder.iterdir()):
        raise RunDirectoryError(
            f"{folder} is there already, and no {MANIFEST} says that it was written by this program; delete it if it "
            "is no longer wanted"
        )
    if stranger := None if listed is None else next(strangers(folder, listed), None):
        raise RunDirectoryError(
            f"{folder} would be replaced, but holds {stranger}, which its {MANIFEST} does not list: move it elsewhere"
        )


def discard_whole(folder: Path, *, ours: bool = False) -> None:
    """Delete a folder that was written whole, or is empty, if it is there; raises as `check_replaceable` does.

    Where only this program writes (`ours`), such as in its cache, a folder with a broken manifest is deleted, too.
    """
    check_replaceable(folder, ours=ours)
    if folder.exists():
        listed = _listed(folder)
        discard(folder, ["**"] if listed is None else listed, last=MANIFEST)
        folder.rmdir()


def discard(folder: Path, names: Iterable[str], *, last: str = "") -> None:
    """Delete what has one of the names in a folder, and folders in it that are empty then; all else stays.

    The file `last`, which marks the folder as ours, is deleted after the others, so that a stop in between leaves it.
    """
    own = [Path(entry.path) for entry, _, matches in _entries(folder, names) if matches]
    own.reverse()  # lower entries before upper ones
    own.sort(key=lambda path: path == folder / last)
    for path in own:
        if not path.is_dir():
            path.unlink()
        elif not any(path.iterdir()):
            path.rmdir()


def strangers(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """Yield the paths in a folder that have none of the names, the upper ones first."""
    return (path for _, path, matches in _entries(folder, names) if not matches)


def _entries(folder: Path, names: Iterable[str]) -> Iterator[tuple[os.DirEntry[str], str, bool]]:
    """Walk a folder level by level: each entry, its path in the folder, and whether it has one of the names.

    Only folders with a matching name are entered.
    """
    split = [name.split("/") for name in names]
    waiting: deque[tuple[str, tuple[str, ...]]] = deque([(str(folder), ())])
    while waiting:
        path, above = waiting.popleft()
        with os.scandir(path) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        for entry in entries:
            parts = (*above, entry.name)
            matches = any(_matches(entry, parts, name) for name in split)
            if matches and entry.is_dir():
                waiting.append((entry.path, parts))
            yield entry, "/".join(parts), matches


def _matches(entry: os.DirEntry[str], parts: tuple[str, ...], name: list[str]) -> bool:
    """Tell whether an entry has this name, or is a folder on the way to it; a link never is."""
    deep, whole = name[-1] == "**", len(parts) >= len(name)
    if len(parts) > len(name) and not deep:
        return False
    if not all(map(fnmatchcase, map(_finished, parts), name)):
        return False
    if whole and entry.is_file(follow_symlinks=False):
        return True
    return (deep or not whole) and entry.is_dir(follow_symlinks=False)


def _finished(name: str) -> str:
    """Return the name that an entry was to get, if it is not finished."""
    return unfinished[1] if (unfinished := UNFINISHED.fullmatch(name)) else name


def _holds_more_than_a_lock(folder: Path) -> bool:
    """Tell whether a folder holds more than a process leaves that is killed between taking it and marking it."""

    def is_of_taking(entry: Path) -> bool:
        if entry.name == LOCK:
            return not entry.is_symlink() and entry.is_file() and entry.stat().st_size == 0
        return entry.name != MARKER and _finished(entry.name) == MARKER

    return not all(map(is_of_taking, folder.iterdir()))


def _listed(folder: Path) -> list[str] | None:
    """Return the names that a folder's manifest lists, its own among them; None where it cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return [*(glob.escape(str(name)) for name in (*manifest["sha256"], *manifest.get("editable", ()))), MANIFEST]
    except (OSError, ValueError, LookupError, TypeError):
        return None
