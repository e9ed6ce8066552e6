"""Hub domains: a row of each data set's schema as text, and failure that says how to go on."""

from __future__ import annotations

import json
from dataclasses import replace

import datasets
import pytest

from gaintune.data import CATALOGUE, hub
from gaintune.data.hub import HubSource, load_hub
from gaintune.errors import AssetError

PAPER_DOMAINS = {
    "pubmedqa": "qiaojin/PubMedQA",
    "wikitext": "Salesforce/wikitext",
    "finphrase": "atrost/financial_phrasebank",
    "pg19": "emozilla/pg19",
    "medqa": "GBaker/MedQA-USMLE-4-options",
    "lambada": "EleutherAI/lambada_openai",
    "sst2": "stanfordnlp/sst2",
    "hellaswag": "Rowan/hellaswag",
}
RETENTION = {
    "wikitext2": "Salesforce/wikitext",
    "bookcorpusopen": "lucadiliello/bookcorpusopen",
    "cc-news": "vblagoje/cc_news",
}
INSTRUCTIONS = {
    "gsm8k": "openai/gsm8k",
    "gsm8k-test": "openai/gsm8k",
    "metamathqa": "meta-math/MetaMathQA",
    "magicoder": "ise-uiuc/Magicoder-Evol-Instruct-110K",
    "humaneval": "openai/openai_humaneval",
}


def test_the_catalogue_holds_the_embedded_domains_and_the_papers():
    assert list(CATALOGUE) == [
        "medical",
        "law",
        "scripture",
        "manual",
        "code",
        *PAPER_DOMAINS,
        *RETENTION,
        *INSTRUCTIONS,
    ]
    hub_domains = {**PAPER_DOMAINS, **RETENTION, **INSTRUCTIONS}
    assert {name: CATALOGUE[name].source for name in hub_domains} == hub_domains
    assert {name for name, entry in CATALOGUE.items() if entry.task == "instruct"} == set(INSTRUCTIONS)
    for name, entry in CATALOGUE.items():
        assert entry.name == name
        assert entry.description
        assert entry.licence


def test_pubmedqa_gives_the_labelled_sections_of_the_abstract():
    row = {
        "pubid": 1,
        "question": "Is it?",
        "context": {"contexts": ["We asked.", "It was."], "labels": ["BACKGROUND", "RESULTS"], "meshes": ["A"]},
        "long_answer": "Yes, it is.",
    }
    assert list(hub.pubmedqa_contexts([row])) == ["BACKGROUND: We asked.\nRESULTS: It was."]


def test_wikitext_lines_become_articles():
    lines = ["", " = First = \n", "", " Words of the first . \n", " = = Section = = \n", " More . \n", ""]
    lines += [" = Second = \n", " x = 1 = y \n"]
    articles = list(hub.wikitext_articles({"text": line} for line in lines))
    assert articles == [
        " = First = \n Words of the first . \n = = Section = = \n More . \n",
        " = Second = \n x = 1 = y \n",
    ]


def test_a_novel_gives_a_passage_from_its_middle():
    book = "\n\n".join(f"chapter {number} " + "word " * 200 for number in range(100))
    (passage,) = hub.novels([{"short_book_title": "A", "publication_date": 1900, "url": "", "text": book}])
    assert len(passage) <= hub.NOVEL_CHARACTERS
    assert 0.3 < book.index(passage) / len(book) < 0.7
    assert list(hub.novels([{"text": "a short book"}])) == ["a short book"]


def test_medqa_gives_question_options_and_answer():
    row = {
        "question": "Which one?",
        "answer": "That",
        "options": {"B": "That", "A": "This", "C": "Other", "D": "None"},
        "meta_info": "step1",
        "answer_idx": "B",
        "metamap_phrases": [],
    }
    assert list(hub.exam_questions([row])) == ["Which one?\nA. This\nB. That\nC. Other\nD. None\nAnswer: B. That"]


def test_hellaswag_gives_the_right_ending_without_markers():
    row = {
        "activity_label": "Computers",
        "ctx_a": "[header] How to make a gift [title] Write a card. [step] Buy paper.",
        "ctx_b": "then",
        "endings": ["eat it.", "write on it. [substeps] Use ink."],
        "label": "1",
    }
    expected = "Computers: How to make a gift. Write a card. Buy paper. Then write on it. Use ink."
    assert list(hub.gold_endings([row])) == [expected]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("bookcorpusopen", {"title": "a-book.epub.txt", "text": "It was late."}),
        ("cc-news", {"title": "News", "text": "It was late.", "domain": "a.org", "date": "2017-01-01", "url": "u"}),
        ("wikitext2", {"text": "It was late."}),
    ],
)
def test_texts_to_be_retained_are_read_in_the_hubs_schema(tmp_path, name, row):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    local = replace(CATALOGUE[name].load.args[0], path=str(tmp_path), configuration=None)
    documents = load_hub(local, name, characters=20)
    assert documents.train[0].text.strip().startswith("It was late.")
    assert (not documents.validation) == (name != "wikitext2")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("gsm8k", {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"}),
        (
            "metamathqa",
            {
                "type": "GSM_SV",
                "query": "Two and two?",
                "original_question": "Two?",
                "response": "2+2=<<2+2=4>>4\n#### 4",
            },
        ),
        ("magicoder", {"instruction": "Two and two?", "response": "2+2=<<2+2=4>>4\n#### 4"}),
        ("humaneval", {"prompt": "Two and two?", "canonical_solution": "2+2=<<2+2=4>>4\n#### 4"}),
    ],
)
def test_instruction_data_gives_prompt_and_completion(tmp_path, name, row, caplog):
    """Rows in the Hub's schema, read through the entry's own way."""
    empty = dict.fromkeys(row, "")
    source = CATALOGUE[name].load.args[0]
    (tmp_path / f"{source.train}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, empty, row)))
    local = replace(source, path=str(tmp_path), configuration=None)
    rows = load_hub(local, name, characters=1000)
    assert not rows.validation
    assert [each.origin for each in rows.train] == [f"{tmp_path} {source.train}: row {number}" for number in (1, 3)]
    assert rows.train[1].row == 3
    asked, answered = rows.train[0].turns
    assert (asked.content, asked.scored) == ("Two and two?", False)
    assert (answered.content, answered.scored) == ("2+2=<<2+2=4>>4\n#### 4", True)
    assert "left out 1 empty text(s)" in caplog.text


def test_gsm8k_is_measured_on_its_test_split_where_that_is_asked_for(tmp_path):
    for split, number in (("train", 1), ("test", 2)):
        row = {"question": f"{number} and {number}?", "answer": f"#### {2 * number}"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    rows = load_hub(replace(CATALOGUE["gsm8k-test"].load.args[0], path=str(tmp_path), configuration=None), "gsm8k-test")
    assert [rows.train[0].turns[0].content, rows.validation[0].turns[0].content] == ["1 and 1?", "2 and 2?"]


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_are_loaded_split_by_split(tmp_path, streaming, caplog):
    rows = {"train": ["one", " ", "three", "four"], "validation": ["held out"]}
    for split, texts in rows.items():
        lines = "".join(json.dumps({"sentence": text, "label": 1}) + "\n" for text in texts)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    source = HubSource(str(tmp_path), hub.column("sentence"), validation="validation", streaming=streaming)
    documents = load_hub(source, "sst2", characters=5)
    assert [document.text for document in documents.train] == (
        ["one", "three"] if streaming else ["one", "three", "four"]
    )
    assert [document.text for document in documents.validation] == ["held out"]
    assert documents.train[1].origin == f"{tmp_path} train: text 3"
    assert "left out 1 empty text(s)" in caplog.text


def test_a_changed_schema_names_the_id_and_the_way_out(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"other": "words"}\n')
    source = HubSource(str(tmp_path), hub.column("sentence"))
    with pytest.raises(AssetError, match=r"cannot load domain 'sst2' from the Hub.*'sentence'.*sst2=PATH"):
        load_hub(source, "sst2")


def test_a_hub_that_is_not_reached_names_the_id_and_the_way_out(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError) as caught:
        CATALOGUE["hellaswag"].load(None)
    message = str(caught.value)
    assert "\n" not in message
    assert "Rowan/hellaswag" in message
    assert "give a local copy, a file or a folder: hellaswag=PATH" in message
