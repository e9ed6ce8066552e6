"""Domains and questions of the Hub: a row of each schema as text or question, and failures that say how to go on."""

from dataclasses import replace

import datasets
import pytest

from gaintune.data import (
    CATALOGUE,
    QUESTION_SETS,
    holds_questions,
    hub,
    load_questions,
    read_choices,
    write_choice_rows,
)
from gaintune.data.hub import HubSource, load_hub
from gaintune.errors import AssetError, DataError
from support import refused
from support.files import write_rows

CONTEXT = {"contexts": ["We asked.", "It did."], "labels": ["METHODS", "RESULTS"], "meshes": []}
RESEARCH = {
    "pubid": 1, "question": "Does it help?", "context": CONTEXT, "long_answer": "It does.", "final_decision": "maybe",
}  # fmt: skip
EXAM = {
    "question": "Which?", "answer": "that", "options": {"A": "this", "B": "that", "C": "x", "D": "y"},
    "meta_info": "step1", "answer_idx": "B", "metamap_phrases": [],
}  # fmt: skip
PAPER_DOMAINS = {
    "pubmedqa": "qiaojin/PubMedQA", "wikitext": "Salesforce/wikitext", "finphrase": "atrost/financial_phrasebank",
    "pg19": "emozilla/pg19", "medqa": "GBaker/MedQA-USMLE-4-options", "lambada": "EleutherAI/lambada_openai",
    "sst2": "stanfordnlp/sst2", "hellaswag": "Rowan/hellaswag",
}  # fmt: skip
RETENTION = {
    "wikitext2": "Salesforce/wikitext", "bookcorpusopen": "lucadiliello/bookcorpusopen", "cc-news": "vblagoje/cc_news",
}  # fmt: skip
INSTRUCTIONS = {
    "gsm8k": "openai/gsm8k", "gsm8k-test": "openai/gsm8k", "metamathqa": "meta-math/MetaMathQA",
    "magicoder": "ise-uiuc/Magicoder-Evol-Instruct-110K", "humaneval": "openai/openai_humaneval",
}  # fmt: skip


def test_the_catalogue_holds_the_embedded_domains_and_the_papers():
    hub_domains = {**PAPER_DOMAINS, **RETENTION, **INSTRUCTIONS}
    assert list(CATALOGUE)[:5] == ["medical", "law", "scripture", "manual", "code"]
    assert {name: CATALOGUE[name].source for name in hub_domains} == hub_domains
    assert {name for name in hub_domains if CATALOGUE[name].task == "instruct"} == set(INSTRUCTIONS)
    for name, entry in CATALOGUE.items():
        assert entry.name == name and entry.description
        assert entry.licence


WIKITEXT = ["", " = First = \n", "", " Words of the first . \n", " = = Section = = \n", " More . \n", ""]
HELLASWAG = {
    "activity_label": "Computers", "ctx_a": "[header] How to make a gift [title] Write a card. [step] Buy paper.",
    "ctx_b": "then", "endings": ["eat it.", "write on it. [substeps] Use ink."], "label": "1",
}  # fmt: skip


@pytest.mark.parametrize(("reader", "rows", "texts"), [
    (hub.pubmedqa_contexts, [RESEARCH], ["METHODS: We asked.\nRESULTS: It did."]),
    (hub.wikitext_articles, [{"text": line} for line in (*WIKITEXT, " = Second = \n", " x = 1 = y \n")], [
        " = First = \n Words of the first . \n = = Section = = \n More . \n", " = Second = \n x = 1 = y \n",
    ]),
    (hub.exam_questions, [{**EXAM, "options": {"B": "that", "A": "this", "C": "x", "D": "y"}}],
     ["Which?\nA. this\nB. that\nC. x\nD. y\nAnswer: B. that"]),
    (hub.gold_endings, [HELLASWAG],
     ["Computers: How to make a gift. Write a card. Buy paper. Then write on it. Use ink."]),
])  # fmt: skip
def test_rows_of_the_hub_become_texts(reader, rows, texts):
    assert list(reader(rows)) == texts


def test_a_novel_gives_a_passage_from_its_middle():
    book = "\n\n".join(f"chapter {number} " + "word " * 200 for number in range(100))
    (passage,) = hub.novels([{"short_book_title": "A", "publication_date": 1900, "url": "", "text": book}])
    assert len(passage) <= hub.NOVEL_CHARACTERS and 0.3 < book.index(passage) / len(book) < 0.7
    assert list(hub.novels([{"text": "a short book"}])) == ["a short book"]


@pytest.mark.parametrize(("name", "row"), [
    ("bookcorpusopen", {"title": "a-book.epub.txt", "text": "It was late."}),
    ("cc-news", {"title": "News", "text": "It was late.", "domain": "a.org", "date": "2017-01-01", "url": "u"}),
    ("wikitext2", {"text": "It was late."}),
])  # fmt: skip
def test_texts_to_be_retained_are_read_in_the_hubs_schema(tmp_path, name, row):
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.jsonl", [row] * 3)
    local = replace(CATALOGUE[name].load.args[0], path=str(tmp_path), configuration=None)
    documents = load_hub(local, name, characters=20)
    assert documents.train[0].text.strip().startswith("It was late.")
    assert (not documents.validation) == (name != "wikitext2")


ASKED, SOLVED = "Two and two?", "2+2=<<2+2=4>>4\n#### 4"


@pytest.mark.parametrize(("name", "row"), [
    ("gsm8k", {"question": ASKED, "answer": SOLVED}),
    ("metamathqa", {"type": "GSM_SV", "query": ASKED, "original_question": "Two?", "response": SOLVED}),
    ("magicoder", {"instruction": ASKED, "response": SOLVED}),
    ("humaneval", {"prompt": ASKED, "canonical_solution": SOLVED}),
])  # fmt: skip
def test_instruction_data_gives_prompt_and_completion(tmp_path, name, row, caplog):
    """Rows in the Hub's schema, read through the entry's own way."""
    empty, source = dict.fromkeys(row, ""), CATALOGUE[name].load.args[0]
    write_rows(tmp_path / f"{source.train}.jsonl", (row, empty, row))
    rows = load_hub(replace(source, path=str(tmp_path), configuration=None), name, characters=1000)
    assert not rows.validation
    assert [each.origin for each in rows.train] == [f"{tmp_path} {source.train}: row {number}" for number in (1, 3)]
    assert rows.train[1].row == 3
    asked, answered = rows.train[0].turns
    assert (asked.content, asked.scored, answered.content, answered.scored) == (ASKED, False, SOLVED, True)
    assert "left out 1 empty text(s)" in caplog.text


def test_gsm8k_test_is_measured_on_its_test_split(tmp_path):
    for split, number in (("train", 1), ("test", 2)):
        write_rows(
            tmp_path / f"{split}.jsonl", [{"question": f"{number} and {number}?", "answer": f"#### {2 * number}"}]
        )
    rows = load_hub(replace(CATALOGUE["gsm8k-test"].load.args[0], path=str(tmp_path), configuration=None), "gsm8k-test")
    assert [rows.train[0].turns[0].content, rows.validation[0].turns[0].content] == ["1 and 1?", "2 and 2?"]


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_are_loaded_split_by_split(tmp_path, streaming, caplog):
    for split, texts in {"train": ["one", " ", "three", "four"], "validation": ["held out"]}.items():
        write_rows(tmp_path / f"{split}.jsonl", ({"sentence": text, "label": 1} for text in texts))
    source = HubSource(str(tmp_path), hub.column("sentence"), validation="validation", streaming=streaming)
    documents = load_hub(source, "sst2", characters=5)
    read = ["one", "three"] if streaming else ["one", "three", "four"]
    assert [document.text for document in documents.train] == read
    assert [document.text for document in documents.validation] == ["held out"]
    assert documents.train[1].origin == f"{tmp_path} train: text 3"
    assert "left out 1 empty text(s)" in caplog.text


def test_a_changed_schema_names_the_id_and_the_way_out(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"other": "words"}\n')
    source = HubSource(str(tmp_path), hub.column("sentence"))
    refused(AssetError, r"cannot load domain 'sst2' from the Hub.*'sentence'.*sst2=PATH", load_hub, source, "sst2")


def test_a_hub_that_is_not_reached_names_the_id_and_the_way_out(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError) as caught:
        CATALOGUE["hellaswag"].load(None)
    message = str(caught.value)
    assert "\n" not in message and "Rowan/hellaswag" in message
    assert "give a local copy, a file or a folder: hellaswag=PATH" in message


HUB_ROWS = {
    "pubmedqa": [RESEARCH, {**RESEARCH, "question": "Does it harm?", "final_decision": "no"}],
    "finphrase": [{"sentence": f"Sales are {n}.", "label": n} for n in range(3)],
    "sst2": [{"idx": n, "sentence": f"film {n}", "label": n} for n in range(2)],
    "medqa": [EXAM],
}


def elsewhere(row: dict) -> dict:
    """The row with another question."""
    return {**row, **{key: f"other {row[key]}" for key in ("question", "sentence") if key in row}}


@pytest.mark.parametrize(("name", "prompt", "choices", "answers"), [
    ("pubmedqa", "METHODS: We asked.\nRESULTS: It did.\nQuestion: Does it help?\nAnswer:",
     (" yes", " no", " maybe"), [2, 1]),
    ("finphrase", "Sales are 0.\nSentiment:", (" negative", " neutral", " positive"), [0, 1, 2]),
    ("sst2", "film 0\nSentiment:", (" negative", " positive"), [0, 1]),
    ("medqa", "Which?\nA. this\nB. that\nC. x\nD. y\nAnswer:", (" A", " B", " C", " D"), [1]),
])  # fmt: skip
def test_rows_of_the_hub_become_questions(tmp_path, monkeypatch, name, prompt, choices, answers):
    """Through the entry itself, with a folder in the data set's place."""
    found = QUESTION_SETS[name]
    asked = [elsewhere(row) for row in HUB_ROWS[name]] if found.validation else HUB_ROWS[name]
    write_rows(tmp_path / f"{found.train}.jsonl", asked)
    write_rows(tmp_path / f"{found.validation or found.train}.jsonl", HUB_ROWS[name])
    monkeypatch.setitem(QUESTION_SETS, name, replace(found, path=str(tmp_path), configuration=None))
    questions = load_questions(name, None, learn=False, seed=0)
    assert (questions.validation[0].prompt, questions.validation[0].choices) == (prompt, choices)
    assert [row.answer for row in questions.validation] == answers
    assert questions.validation[0].origin == f"{tmp_path} {found.validation or found.train}: row 1"
    assert questions.train == ()
    assert len(load_questions(name, None, learn=True, seed=0).train) == (1 if name == "pubmedqa" else len(answers))


def test_a_set_without_a_split_is_split_where_some_of_it_is_trained(tmp_path):
    file = write_rows(tmp_path / "sst2.jsonl", [{"sentence": f"film number {n}", "label": n % 2} for n in range(200)])
    whole = load_questions("sst2", file, learn=False, seed=0)
    assert (len(whole.train), len(whole.validation)) == (0, 200)
    sides = load_questions("sst2", file, learn=True, seed=0)
    assert 5 < len(sides.validation) < 40
    assert not {row.prompt for row in sides.train} & {row.prompt for row in sides.validation}
    assert len(sides.train) + len(sides.validation) == 200
    assert sides == load_questions("sst2", file, learn=True, seed=0)
    assert sides.validation != load_questions("sst2", file, learn=True, seed=1).validation


def test_a_folders_own_split_is_kept_and_labels_are_those_of_both_sides(tmp_path):
    learned = [{"text": "a", "label": "positive"}, {"text": "b", "label": "neutral"}]
    write_rows(tmp_path / "finphrase" / "train.jsonl", learned)
    write_rows(tmp_path / "finphrase" / "validation.jsonl", [{"text": "c", "label": "negative"}])
    questions = load_questions("finphrase", tmp_path / "finphrase", learn=True, seed=0)
    assert [row.prompt for row in questions.train] == ["a\nSentiment:", "b\nSentiment:"]
    assert [row.prompt for row in questions.validation] == ["c\nSentiment:"]
    assert {row.choices for row in (*questions.train, *questions.validation)} == {
        (" negative", " neutral", " positive")
    }


def test_rows_on_both_sides_of_a_split_are_measured_and_not_trained(tmp_path, caplog):
    write_rows(tmp_path / "sst2" / "train.jsonl", [{"sentence": f"film {n}", "label": n % 2} for n in range(5)])
    write_rows(tmp_path / "sst2" / "validation.jsonl", [{"sentence": f"film {n}", "label": n % 2} for n in (3, 4, 7)])
    questions = load_questions("sst2", tmp_path / "sst2", learn=True, seed=0)
    assert [row.prompt for row in questions.train] == [f"film {n}\nSentiment:" for n in range(3)]
    assert len(questions.validation) == 3
    assert "2 rows to train on left out, which are asked too" in caplog.text
    write_rows(tmp_path / "sst2" / "train.jsonl", [{"sentence": "film 7", "label": 1}])
    both = (load_questions, "sst2", tmp_path / "sst2")
    refused(DataError, "every row to train on is also asked", *both, learn=True, seed=0)


@pytest.mark.parametrize("name", list(HUB_ROWS))
def test_questions_that_are_written_are_read_back(tmp_path, name):
    rows = load_questions(name, write_rows(tmp_path / "rows.jsonl", HUB_ROWS[name]), learn=False, seed=0).validation
    write_choice_rows(rows, tmp_path / "written.jsonl")
    again = read_choices(name, tmp_path / "written.jsonl")
    assert [replace(row, origin="") for row in again] == [replace(row, origin="") for row in rows]


def test_files_and_folders_with_questions_are_recognised(tmp_path):
    assert holds_questions(write_rows(tmp_path / "asked" / "test.jsonl", [EXAM]).parent)
    assert not holds_questions(write_rows(tmp_path / "texts" / "train.jsonl", [{"text": "an abstract"}]).parent)
    cut = write_rows(tmp_path / "cut.jsonl", [EXAM])
    cut.write_text(cut.read_text() + "{ no row\n")
    assert holds_questions(cut), "the first row says it"
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("no rows")
    assert not holds_questions(tmp_path / "else")


def with_context(contexts: object, *labels: str) -> dict:
    return {**RESEARCH, "context": {"contexts": contexts, "labels": labels} if labels else contexts}


@pytest.mark.parametrize(("name", "rows", "message"), [
    ("pubmedqa", [RESEARCH, {**RESEARCH, "final_decision": "perhaps"}], r":2: the answer 'perhaps' is none of the 3"),
    ("x", [with_context("abc")], r":1: column 'context' must hold"),
    ("x", [with_context(["We asked."], "METHODS", "RESULTS")], r":1: column 'context' has 1 contexts and 2 labels"),
    ("x", [with_context([3], "METHODS")], r":1: contexts and labels in column 'context' must be lists"),
])  # fmt: skip
def test_a_broken_question_is_named(tmp_path, name, rows, message):
    file = write_rows(tmp_path / "rows.jsonl", rows)
    refused(DataError, rf"rows\.jsonl{message}", load_questions, name, file, learn=False, seed=0)


def test_other_files_and_unknown_sets_of_questions_are_named(tmp_path):
    (tmp_path / "rows.txt").write_text("text")
    options = {"learn": False, "seed": 0}
    refused(DataError, "a file of questions ends in one of", load_questions, "x", tmp_path / "rows.txt", **options)
    unknown = "no set of questions is called 'riddles'; known by name: pubmedqa"
    refused(DataError, unknown, load_questions, "riddles", None, **options)


def test_questions_of_a_hub_that_is_not_reached_name_the_id_and_the_way_out(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = r"cannot load questions 'medqa' from the Hub data set 'GBaker/.*medqa=PATH"
    refused(AssetError, message, load_questions, "medqa", None, learn=False, seed=0)
