"""Labelled rows: which columns, which labels, which side, what is cut, and every mistake by its line."""

from dataclasses import replace
from pathlib import Path

import datasets
import pandas
import pytest
import torch

from gaintune.config import ClassifyConfig, DomainConfig, build_plan
from gaintune.data import GLUE, Padding, load_classification
from gaintune.data.labelled import load_labelled
from gaintune.errors import AssetError, ConfigError, DataError
from support import STUDY_DATA, needs_study_data, refused, tiny_base, tiny_encoders, tiny_glue

TOKENIZER = tiny_encoders.tokenizer()
PAIR = {"text_a": "one", "text_b": "two", "label": "yes"}


def domain(path: Path | str, **fields) -> DomainConfig:
    return DomainConfig(name="rows", source=str(path), **fields)


def rows_of(count: int = 60) -> list[dict]:
    return [{"text": f"text number {n}", "label": "even" if n % 2 == 0 else "odd"} for n in range(count)]


def load(path: Path, tokenizer=TOKENIZER, *, seed: int = 0, segments: bool = False, **settings):
    return load_classification(domain(path), ClassifyConfig(**settings), tokenizer, seed=seed, segments=segments)


def written(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> Path:
    return tiny_encoders.write_rows(folder / name, rows)


@pytest.mark.parametrize("columns", [
    ("sentence",), ("text",), ("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
    ("question", "sentence"), ("question1", "question2"),
])  # fmt: skip
def test_the_columns_of_glue_and_of_local_files_are_found(columns, tmp_path):
    rows = [{**{column: f"{column} {n}" for column in columns}, "label": n % 2, "idx": n} for n in range(40)]
    texts = load_labelled(domain(written(tmp_path, rows)), seed=0)
    found = sorted([*texts.train, *texts.validation], key=lambda row: int(row.text_a.split()[-1]))
    assert [row.text_a for row in found] == [f"{columns[0]} {n}" for n in range(40)]
    assert [row.text_b for row in found] == [f"{columns[1]} {n}" if columns[1:] else None for n in range(40)]
    assert [row.label for row in found] == [str(n % 2) for n in range(40)]


@pytest.mark.parametrize(("kind", "options"), [
    ("jsonl", {"orient": "records", "lines": True}), ("json", {"orient": "records"}), ("csv", {"index": False}),
    ("parquet", {}),
])  # fmt: skip
def test_every_kind_of_file_gives_the_same_rows(kind, options, tmp_path):
    rows = [{**row, "text_b": None, "text_a": row["text"]} for row in rows_of()]
    file = tmp_path / f"rows.{kind}"
    getattr(pandas.DataFrame(rows), f"to_{kind.removesuffix('l')}")(file, **options)
    texts = load_labelled(domain(file), seed=0)
    found = {(row.text_a, row.text_b, row.label) for row in (*texts.train, *texts.validation)}
    assert found == {(row["text"], None, row["label"]) for row in rows}
    assert len(texts.validation) == len(load_labelled(domain(written(tmp_path, rows, "again.jsonl")), 0).validation)


def test_a_folders_own_split_is_kept_and_other_files_are_split_by_their_text(tmp_path):
    folder = tmp_path / "split"
    written(folder, rows_of(10), "train.jsonl")
    written(folder, rows_of(4), "validation.jsonl")
    texts = load_labelled(domain(folder), seed=0)
    assert (len(texts.train), len(texts.validation)) == (10, 4)
    twice = [*rows_of(100), *({**row, "text": row["text"].upper()} for row in rows_of(100))]
    split = load_labelled(domain(written(tmp_path, twice)), seed=0)
    sides = [{row.text_a.lower() for row in side} for side in (split.train, split.validation)]
    assert not sides[0] & sides[1] and len(sides[1]) > 3
    assert load_labelled(domain(tmp_path / "rows.jsonl"), seed=1).validation != split.validation


@pytest.mark.parametrize(("row", "message"), [
    ({"text_a": "x", "text_b": "y"}, r"rows\.jsonl:3: has no column 'label'; the columns are text_a, text_b"),
    ({"text_b": "y", "label": "no"}, r"rows\.jsonl:3: has no column 'text_a'"),
    ({**PAIR, "text_a": "  "}, r"rows\.jsonl:3: column 'text_a' is empty"),
    ({**PAIR, "text_b": None}, r"rows\.jsonl:3: column 'text_b' is null"),
    ({**PAIR, "label": None}, r"rows\.jsonl:3: the label is None, expected a name or a whole number"),
    ({**PAIR, "label": 0.5}, r"rows\.jsonl:3: the label is 0\.5"),
    ({**PAIR, "label": " "}, r"rows\.jsonl:3: the label is ' '"),
    ({**PAIR, "label": -1}, r"rows\.jsonl:3: the label is -1, which data sets give to rows without one"),
    ({**PAIR, "label": "-1"}, r"rows\.jsonl:3: the label is -1, which"),
])  # fmt: skip
def test_a_broken_row_is_named_by_its_line(row, message, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        load(written(tmp_path, [PAIR, {**PAIR, "label": "no"}, row]))
    assert "\n" not in str(caught.value)


def test_columns_that_hold_no_text_to_classify_are_named(tmp_path):
    file = written(tmp_path, [{"review": "good", "label": 1}, {"review": "bad", "label": 0}])
    refused(DataError, r"rows\.jsonl:1: no column holds the text.*\(the columns are review, label\)", load, file)
    texts = load_labelled(domain(file, text_column="review"), seed=0)
    assert {row.text_a for row in (*texts.train, *texts.validation)} == {"good", "bad"}
    message = r"nowhere is no file or folder, and none of GLUE's tasks.*cola, mnli"
    refused(DataError, message, load_labelled, domain("nowhere"), seed=0)


def test_one_label_and_labels_unknown_to_training_are_refused(tmp_path):
    folder = tmp_path / "split"
    written(folder, rows_of(10), "train.jsonl")
    file = written(folder, [*rows_of(4), {"text": "new", "label": "prime"}], "validation.jsonl")
    refused(DataError, r"validation\.jsonl:5: no training row has the label 'prime' \(they have even", load, folder)
    file.unlink()
    same = written(tmp_path, [{**row, "label": "same"} for row in rows_of()])
    refused(DataError, r"rows\.jsonl:\d+: this and every other training row has the label 'same'", load, same)


def test_labels_are_sorted_numbers_by_value(tmp_path):
    file = written(tmp_path, [{"text": f"t{n}", "label": n % 12} for n in range(240)])
    assert load(file).labels == tuple(str(number) for number in range(12))
    named = written(tmp_path, [{"text": f"t{n}", "label": f"c{n % 12}"} for n in range(240)], "named.jsonl")
    assert load(named).labels == tuple(sorted(f"c{number}" for number in range(12)))


def test_rows_are_drawn_in_an_order_that_the_seed_decides(tmp_path):
    file = written(tmp_path, rows_of(100))
    whole, some = load(file), load(file, train_rows=10, validation_rows=3)
    assert (len(some.train), len(some.validation)) == (10, 3)
    assert all(torch.equal(some.train.input_ids[row], whole.train.input_ids[row]) for row in range(10))
    other = load(file, train_rows=10, validation_rows=3, seed=1)
    assert [row.tolist() for row in other.train.input_ids] != [row.tolist() for row in some.train.input_ids]
    assert load(file, train_rows=10, validation_rows=3).content_hash == some.content_hash
    assert len({whole.content_hash, some.content_hash, other.content_hash, load(file, max_length=99).content_hash}) == 4


def test_the_hash_follows_labels_and_texts(tmp_path):
    rows = rows_of(60)
    relabelled = [{**row, "label": "even" if n == 7 else row["label"]} for n, row in enumerate(rows)]
    changed = [{**row, "text": "other" if n == 7 else row["text"]} for n, row in enumerate(rows)]
    hashes = {load(written(tmp_path, each)).content_hash for each in (rows, relabelled, changed)}
    assert len(hashes) == 3 and load(written(tmp_path, rows, "elsewhere.jsonl")).content_hash in hashes


def test_pairs_are_joined_as_the_tokenizer_joins_them_and_cut_with_a_count(tmp_path, caplog):
    rows = [{"text_a": f"a{n}" + "x" * 30, "text_b": "y" * (3 if n % 4 else 60), "label": n % 2} for n in range(80)]
    loaded = load(written(tmp_path, rows), max_length=40)
    assert all(len(row) <= 40 for row in loaded.train.input_ids)
    whole = sum(2 + 30 + len(str(n)) - 1 + 3 + 4 <= 40 for n in range(80) if n % 4)
    assert loaded.train.truncated + loaded.validation.truncated == 80 - whole
    cut = f"{loaded.train.truncated} of {len(loaded.train)} training rows"
    assert f"{cut} are longer than classify.max_length (40" in caplog.text
    first = loaded.train.input_ids[0].tolist()
    assert (first[0], first.count(2), first[-1]) == (0, 3, 2)  # <s> a </s></s> b </s>
    bert = load(written(tmp_path, rows), tiny_encoders.bert_tokenizer(), max_length=40, segments=True)
    kinds = bert.train.segments[0].tolist()
    assert kinds == sorted(kinds) and set(kinds) == {0, 1} and len(kinds) == len(bert.train.input_ids[0])


def test_a_decoders_pair_is_two_lines(tmp_path):
    rows = [{"text_a": f"a{n}", "text_b": "b", "label": n % 2} for n in range(40)]
    tokenizer = tiny_base.tokenizer()
    loaded = load(written(tmp_path, rows), tokenizer)
    texts = {tokenizer.decode(row) for row in (*loaded.train.input_ids, *loaded.validation.input_ids)}
    assert texts == {f"a{n}\nb" for n in range(40)}


def test_a_batch_is_padded_to_its_longest_row_and_masked():
    keys = ("input_ids", "labels", "token_type_ids")
    rows = [dict(zip(keys, map(torch.tensor, row), strict=True)) for row in (([5, 6, 7], 1, [0, 1, 1]), ([8], 0, [0]))]
    batch = Padding(9)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 0]] and batch["labels"].tolist() == [1, 0]


def test_validation_rows_that_are_trained_on_are_counted(tmp_path, caplog):
    folder = tmp_path / "split"
    written(folder, rows_of(10), "train.jsonl")
    written(folder, [{"text": "Text number 3.", "label": "odd"}, {"text": "new", "label": "odd"}], "validation.jsonl")
    assert load(folder).repeated == 1
    assert "1 validation row(s) also stand in the training rows" in caplog.text


@pytest.mark.parametrize("name", tiny_glue.SCHEMAS)
def test_glue_has_the_same_rows_by_name_and_as_a_local_copy(name, tmp_path, monkeypatch, caplog):
    schema, task = tiny_glue.SCHEMAS[name], tiny_glue.write(tmp_path, name)
    assert (GLUE[name].labels, GLUE[name].validation) == (task.labels, task.validation)
    assert (GLUE[name].path, GLUE[name].configuration) == ("nyu-mll/glue", name)
    monkeypatch.setitem(GLUE, name, task)
    hub = load_labelled(DomainConfig(name="x", source=name), seed=0)
    local = load_labelled(DomainConfig(name=name, source=str(tmp_path / name)), seed=0)
    assert (len(hub.train), len(hub.validation)) == (24, 9)
    assert hub.validation[0].origin.endswith(f"{name} {task.validation}: row 1")
    for ours, copied in zip((*hub.train, *hub.validation), (*local.train, *local.validation), strict=True):
        assert replace(ours, origin="") == replace(copied, origin="")
    for number, row in enumerate(hub.train):
        assert row.text_a == f"train {schema.columns[0]} {number}"
        assert row.text_b == (f"train {schema.columns[1]} {number}" if schema.columns[1:] else None)
        assert row.label == schema.labels[number % len(schema.labels)]
    left_out = "not part of the domain: README.md, validation_mismatched-00000-of-00001.parquet"
    assert (left_out in caplog.text) == (name == "mnli")


def test_numbers_get_the_names_of_a_glue_task_only_where_they_fit(tmp_path):
    rows = [{"text": f"t{n}", "label": n % 3} for n in range(60)]
    texts = load_labelled(DomainConfig(name="sst2", source=str(written(tmp_path, rows))), seed=0)
    assert {row.label for row in texts.train} == {"0", "1", "2"}
    two = written(tmp_path, [{**row, "label": n % 2} for n, row in enumerate(rows)], "two.jsonl")
    assert {row.label for row in load_labelled(domain(two), seed=0).train} == {"0", "1"}


def test_a_task_that_is_not_reached_names_the_id_and_the_way_out(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError) as caught:
        load_labelled(domain("mrpc"), seed=0)
    assert "nyu-mll/glue" in str(caught.value)
    assert "give a local copy, a file or a folder: mrpc=PATH" in str(caught.value)


def test_the_plan_of_a_classifier_has_an_encoder_and_no_token_budgets():
    plan = build_plan({"data": {"task": "classify", "domains": ["mrpc"]}, "model": {"dtype": "fp32"}})
    assert (plan.model.name, plan.model.dtype, plan.classifies) == ("FacebookAI/roberta-base", "fp32", True)
    assert build_plan({"data": {"domains": [{"name": "x", "source": "y", "task": "classify"}]}}).classifies
    assert build_plan({"data": {"task": "classify"}, "model": {"name": "demo"}}).model.name == "demo"
    assert build_plan({}).model.name == "demo"
    message = r"data\.train_tokens is for text and instructions.*classify\.train_rows"
    refused(ConfigError, message, build_plan, {"data": {"task": "classify", "train_tokens": 1024}})


@needs_study_data("glue")
@pytest.mark.parametrize(("task", "sizes", "labels"), [
    ("cola", (7695, 1043), ("acceptable", "unacceptable")),
    ("mnli", (6684, 1000), ("contradiction", "entailment", "neutral")),
    ("mrpc", (3300, 408), ("equivalent", "not_equivalent")),
    ("qnli", (5400, 1500), ("entailment", "not_entailment")),
    ("sst2", (6917, 872), ("negative", "positive")),
])  # fmt: skip
def test_the_study_rows_of_glue(task, sizes, labels):
    texts = load_labelled(DomainConfig(name=task, source=str(STUDY_DATA / "glue" / task)), seed=0)
    assert (len(texts.train), len(texts.validation)) == sizes
    assert (texts.train[0].text_b is None) == (task in ("cola", "sst2"))
    assert {row.label for row in texts.train} == set(labels)
