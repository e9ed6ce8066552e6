"""The five tasks of GLUE as the Hub has them, in columns, label names and splits, with a few made-up rows."""

from dataclasses import dataclass
from pathlib import Path

import datasets

from gaintune.data.hub import HubSource


@dataclass(frozen=True)
class Schema:
    """Columns of the texts, and names of the labels 0, 1, ..."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    validations: tuple[str, ...] = ("validation",)


SCHEMAS = {
    "cola": Schema(("sentence",), ("unacceptable", "acceptable")),
    "mnli": Schema(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
                   ("validation_matched", "validation_mismatched")),
    "mrpc": Schema(("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "qnli": Schema(("question", "sentence"), ("entailment", "not_entailment")),
    "sst2": Schema(("sentence",), ("negative", "positive")),
}  # fmt: skip


def write(folder: Path, name: str, train: int = 24, validation: int = 9) -> HubSource:
    """Write a task's files as a copy of its data set on the Hub, and return the task that reads them there."""
    schema = SCHEMAS[name]
    texts = {column: datasets.Value("string") for column in schema.columns}
    label = datasets.ClassLabel(names=list(schema.labels))
    features = datasets.Features({**texts, "label": label, "idx": datasets.Value("int32")})
    for split, count in (("train", train), *((each, validation) for each in schema.validations)):
        rows = [
            {column: f"{split} {column} {number}" for column in schema.columns}
            | {"label": number % len(schema.labels), "idx": number}
            for number in range(count)
        ]
        made = datasets.Dataset.from_list(rows, features=features)
        (folder / name).mkdir(parents=True, exist_ok=True)
        made.to_parquet(str(folder / name / f"{split}-00000-of-00001.parquet"))
    splits = "".join(f"  - split: {split}\n    path: {split}-*\n" for split in ("train", *schema.validations))
    (folder / name / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")
    return HubSource(str(folder / name), validation=schema.validations[0], labels=schema.labels)
