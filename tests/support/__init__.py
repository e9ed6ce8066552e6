"""What several tests share: tiny models, texts, rows, refusals, and runs that are killed."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

STUDY_DATA = Path(__file__).parents[3] / "shared" / "data"
"""Real data sets beside the checkout; what needs them is skipped where they are missing."""


def write_rows(file: Path, rows: Iterable[object]) -> Path:
    """Write rows as a .jsonl file, and return its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def refused(error: type[Exception], message: str, call, *arguments, **options) -> None:
    """Check that a call raises an error whose text matches the message."""
    __tracebackhide__ = True
    with pytest.raises(error, match=message):
        call(*arguments, **options)


def needs_study_data(part: str):
    """Mark a test that reads a file or folder of the study data, and skip it where there is none."""
    path = STUDY_DATA / part

    def marked(test):
        return pytest.mark.study_data(pytest.mark.skipif(not path.exists(), reason=f"{path} is missing")(test))

    return marked
