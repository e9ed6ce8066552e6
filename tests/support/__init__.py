"""What several tests share: tiny models, texts, rows, refusals, and runs that are killed."""

from pathlib import Path

import pytest

STUDY_DATA = Path(__file__).parents[3] / "shared" / "data"
"""Real data sets beside the checkout; what needs them is skipped where they are missing."""


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
