"""What differs between two nested values, in words short enough for a message."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HASH = re.compile(r"[0-9a-f]{40,}")


def differences(ours: Any, theirs: Any, key: str = "") -> list[str]:
    """Dotted keys at which two nested values differ, with both values; entries of a list go by their names."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        names = sorted({*ours, *theirs})
        return [
            line
            for name in names
            for line in differences(ours.get(name), theirs.get(name), f"{key}.{name}" if key else str(name))
        ]
    if ours == theirs:
        return []
    if isinstance(ours, list) and isinstance(theirs, list):
        named = [_name(each) for each in ours]
        if None not in named and named == [_name(each) for each in theirs]:
            pairs = zip(named, ours, theirs, strict=True)
            return [line for name, one, other in pairs for line in differences(one, other, f"{key}.{name}")]
    return [f"{key}: {_short(theirs)} there, {_short(ours)} now"]


def _name(entry: Any) -> str | None:
    """What an entry of a list is called: a method by its label, a domain by its name."""
    name = (entry.get("label") or entry.get("name")) if isinstance(entry, Mapping) else None
    return None if name is None else str(name)


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return _name(value) or f"{len(value)} keys"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, str) and HASH.fullmatch(value):
        return f"'{value[:12]}...'"
    return repr(value)
