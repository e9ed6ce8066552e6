"""lm-eval's own task over local rows: its prompts and metrics as they stand, only the data redirected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gaintune.errors import DataError
from gaintune.evaluate.benchmarks.rows.sources import LocalRows


def redirected(
    settings: Mapping[str, Any], rows: LocalRows, fewshot: int
) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """A task file's settings with the rows in place of the Hub's.

    Args:
        settings: what lm-eval's task file says.
        rows: the rows.
        fewshot: worked examples before a question.

    Returns:
        The settings; the split that is measured; and what differs from lm-eval's own, in words.

    Raises:
        DataError: no split to measure, or none to take worked examples from.
    """
    from datasets import DatasetDict

    own = settings.get("test_split") or settings.get("validation_split")
    splits = {str(own) if rows.alone else name: data for name, data in rows.splits.items()}
    if "validation" not in splits and "dev" in splits and settings.get("fewshot_split") != "dev":
        splits["validation"] = splits.pop("dev")  # another word for it everywhere but in MMLU
    measured = next((name for name in (own, "validation", "test") if name in splits), None)
    if measured is None:
        raise DataError(f"{rows.origin}: no rows to measure {settings['task']} on; found {', '.join(splits)}")
    notes = [*rows.notes]
    if measured != own:
        notes.append(f"rows of the {measured} split; lm-eval's own is {own}")
    changes: dict[str, Any] = {
        **rows.changes,
        "training_split": _kept(settings.get("training_split"), splits),
        "validation_split": "validation" if "validation" in splits else None,
        "test_split": measured if measured != "validation" else None,
        "custom_dataset": lambda **_: DatasetDict({**splits}),
        **_examples(settings, splits, measured, fewshot, rows),
    }
    examples = changes["fewshot_split"] or changes["training_split"] or changes["validation_split"]
    if fewshot and examples == measured and not _own_examples(settings):
        notes.append("worked examples from the rows that are asked, never a row's own")
    return {**settings, **changes}, "given" if rows.alone else measured, tuple(notes)


def _kept(split: str | None, splits: Mapping[str, Any]) -> str | None:
    return split if split in splits else None


def _own_examples(settings: Mapping[str, Any]) -> bool:
    """Whether the task file brings its worked examples itself."""
    return bool((settings.get("fewshot_config") or {}).get("samples"))


def _examples(
    settings: Mapping[str, Any], splits: Mapping[str, Any], measured: str, fewshot: int, rows: LocalRows
) -> dict[str, Any]:
    """The split that worked examples come from; of a single file that names no split its own rows."""
    wanted = settings.get("fewshot_split") or (settings.get("fewshot_config") or {}).get("split")
    if _own_examples(settings):
        return {"fewshot_split": None}
    if wanted in splits:
        return {"fewshot_split": wanted}
    if wanted is not None and fewshot and not rows.alone:
        raise DataError(
            f"{rows.origin}: {settings['task']} takes its {fewshot} worked examples from the split {wanted!r}, and "
            f"only {', '.join(splits)} is there; add it, or ask for 0 examples"
        )
    if "validation" not in splits and _kept(settings.get("training_split"), splits) is None:
        return {"fewshot_split": measured}  # lm-eval then leaves out the row that is asked
    return {"fewshot_split": None}
