"""Sets of questions: rows in the Hub's columns, sides that share no row, and files that are read back as written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gaintune.data import QUESTION_SETS, holds_questions, load_questions, read_choices, write_choice_rows
from gaintune.errors import AssetError, DataError

RESEARCH = {
    "pubid": 1,
    "question": "Does it help?",
    "context": {"contexts": ["We asked.", "It did."], "labels": ["METHODS", "RESULTS"], "meshes": []},
    "long_answer": "It does.",
    "final_decision": "maybe",
}
EXAM = {
    "question": "Which?",
    "answer": "that",
    "options": {"A": "this", "B": "that", "C": "x", "D": "y"},
    "meta_info": "step1",
    "answer_idx": "B",
    "metamap_phrases": [],
}
HUB_ROWS = {
    "pubmedqa": [RESEARCH, {**RESEARCH, "question": "Does it harm?", "final_decision": "no"}],
    "finphrase": [{"sentence": f"Sales are {n}.", "label": n} for n in range(3)],
    "sst2": [{"idx": n, "sentence": f"film {n}", "label": n} for n in range(2)],
    "medqa": [EXAM],
}


def write(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def elsewhere(row: dict) -> dict:
    """The row with another question."""
    return {**row, **{key: f"other {row[key]}" for key in ("question", "sentence") if key in row}}


@pytest.mark.parametrize(
    ("name", "prompt", "choices", "answers"),
    [
        (
            "pubmedqa",
            "METHODS: We asked.\nRESULTS: It did.\nQuestion: Does it help?\nAnswer:",
            (" yes", " no", " maybe"),
            [2, 1],
        ),
        ("finphrase", "Sales are 0.\nSentiment:", (" negative", " neutral", " positive"), [0, 1, 2]),
        ("sst2", "film 0\nSentiment:", (" negative", " positive"), [0, 1]),
        ("medqa", "Which?\nA. this\nB. that\nC. x\nD. y\nAnswer:", (" A", " B", " C", " D"), [1]),
    ],
)
def test_rows_of_the_hub_become_questions(tmp_path, monkeypatch, name, prompt, choices, answers):
    """Through the entry itself, with a folder in the data set's place."""
    found = QUESTION_SETS[name]
    asked = [elsewhere(row) for row in HUB_ROWS[name]] if found.validation else HUB_ROWS[name]
    write(tmp_path / f"{found.train}.jsonl", asked)
    write(tmp_path / f"{found.validation or found.train}.jsonl", HUB_ROWS[name])
    monkeypatch.setitem(QUESTION_SETS, name, replace(found, path=str(tmp_path), configuration=None))
    questions = load_questions(name, None, learn=False, seed=0)
    assert questions.validation[0].prompt == prompt
    assert questions.validation[0].choices == choices
    assert [row.answer for row in questions.validation] == answers
    assert questions.validation[0].origin == f"{tmp_path} {found.validation or found.train}: row 1"
    assert questions.train == ()
    assert len(load_questions(name, None, learn=True, seed=0).train) == (1 if name == "pubmedqa" else len(answers))


def test_a_set_without_a_split_is_split_where_some_of_it_is_learnt(tmp_path):
    rows = [{"sentence": f"film number {n}", "label": n % 2} for n in range(200)]
    file = write(tmp_path / "sst2.jsonl", rows)
    whole = load_questions("sst2", file, learn=False, seed=0)
    assert (len(whole.train), len(whole.validation)) == (0, 200)
    sides = load_questions("sst2", file, learn=True, seed=0)
    assert 5 < len(sides.validation) < 40
    assert not {row.prompt for row in sides.train} & {row.prompt for row in sides.validation}
    assert len(sides.train) + len(sides.validation) == 200
    assert sides == load_questions("sst2", file, learn=True, seed=0)
    assert sides.validation != load_questions("sst2", file, learn=True, seed=1).validation


def test_a_folders_own_split_is_kept_and_labels_are_those_of_both_sides(tmp_path):
    write(
        tmp_path / "finphrase" / "train.jsonl", [{"text": "a", "label": "positive"}, {"text": "b", "label": "neutral"}]
    )
    write(tmp_path / "finphrase" / "validation.jsonl", [{"text": "c", "label": "negative"}])
    questions = load_questions("finphrase", tmp_path / "finphrase", learn=True, seed=0)
    assert [row.prompt for row in questions.train] == ["a\nSentiment:", "b\nSentiment:"]
    assert [row.prompt for row in questions.validation] == ["c\nSentiment:"]
    assert {row.choices for row in (*questions.train, *questions.validation)} == {
        (" negative", " neutral", " positive")
    }


def test_rows_that_are_asked_are_not_learnt_although_the_sources_own_split_has_them_on_both_sides(tmp_path, caplog):
    write(tmp_path / "sst2" / "train.jsonl", [{"sentence": f"film {n}", "label": n % 2} for n in range(5)])
    write(tmp_path / "sst2" / "validation.jsonl", [{"sentence": f"film {n}", "label": n % 2} for n in (3, 4, 7)])
    questions = load_questions("sst2", tmp_path / "sst2", learn=True, seed=0)
    assert [row.prompt for row in questions.train] == [f"film {n}\nSentiment:" for n in range(3)]
    assert len(questions.validation) == 3
    assert "2 rows to train on left out, which are asked too" in caplog.text
    write(tmp_path / "sst2" / "train.jsonl", [{"sentence": "film 7", "label": 1}])
    with pytest.raises(DataError, match="every row to train on is also asked"):
        load_questions("sst2", tmp_path / "sst2", learn=True, seed=0)


@pytest.mark.parametrize("name", list(HUB_ROWS))
def test_questions_that_are_written_are_read_back(tmp_path, name):
    rows = load_questions(name, write(tmp_path / "rows.jsonl", HUB_ROWS[name]), learn=False, seed=0).validation
    write_choice_rows(rows, tmp_path / "written.jsonl")
    again = read_choices(name, tmp_path / "written.jsonl")
    assert [replace(row, origin="") for row in again] == [replace(row, origin="") for row in rows]


def test_what_holds_no_questions_is_told_apart(tmp_path):
    assert holds_questions(write(tmp_path / "asked" / "test.jsonl", [EXAM]).parent)
    assert not holds_questions(write(tmp_path / "texts" / "train.jsonl", [{"text": "an abstract"}]).parent)
    cut = write(tmp_path / "cut.jsonl", [EXAM])
    cut.write_text(cut.read_text() + "{ no row\n")
    assert holds_questions(cut), "the first row says it"
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("no rows")
    assert not holds_questions(tmp_path / "else")


def test_a_broken_row_and_an_unknown_set_are_named(tmp_path):
    broken = {**RESEARCH, "final_decision": "perhaps"}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the answer 'perhaps' is none of the 3 choices"):
        load_questions("pubmedqa", write(tmp_path / "rows.jsonl", [RESEARCH, broken]), learn=False, seed=0)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: column 'context' must hold"):
        load_questions("x", write(tmp_path / "rows.jsonl", [{**RESEARCH, "context": "abc"}]), learn=False, seed=0)
    uneven = {**RESEARCH, "context": {"contexts": ["We asked."], "labels": ["METHODS", "RESULTS"]}}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: column 'context' has 1 contexts and 2 labels"):
        load_questions("x", write(tmp_path / "rows.jsonl", [uneven]), learn=False, seed=0)
    bare = {**RESEARCH, "context": {"contexts": [3], "labels": ["METHODS"]}}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: contexts and labels in column 'context' must be lists"):
        load_questions("x", write(tmp_path / "rows.jsonl", [bare]), learn=False, seed=0)
    (tmp_path / "rows.txt").write_text("text")
    with pytest.raises(DataError, match="a file of questions ends in one of"):
        load_questions("x", tmp_path / "rows.txt", learn=False, seed=0)
    with pytest.raises(DataError, match="no set of questions is called 'riddles'; known by name: pubmedqa"):
        load_questions("riddles", None, learn=False, seed=0)


def test_a_hub_that_is_not_reached_names_the_id_and_the_way_out(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError, match=r"cannot load questions 'medqa' from the Hub data set 'GBaker/.*medqa=PATH"):
        load_questions("medqa", None, learn=False, seed=0)
