"""The command line of classifiers, masked-LM perplexity and choices: what it prints, and what it refuses."""

import json
from pathlib import Path

import pytest

from gaintune.errors import ConfigError
from gaintune.workflows import merge_adapter
from support import refused, tiny_base, tiny_domains, tiny_encoders
from support.cli import QUICK, run


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tiny encoder, labelled rows, and a classifier that the command line made of them."""
    folder = tmp_path_factory.mktemp("work")
    tiny_encoders.folder(folder / "base")
    tiny_encoders.write_rows(folder / "rule.jsonl", tiny_encoders.rule_rows(120))
    printed = run(
        "adapt", "--task", "classify", "--model", folder / "base", "--domain", folder / "rule.jsonl",
        "--method", "gain-ffn", "--epochs", 4, "--out", folder / "adapter", *QUICK,
    )  # fmt: skip
    (folder / "printed").write_text(printed)
    return folder


def test_adapt_prints_accuracy_beside_the_most_frequent_label_and_every_class(work):
    printed = (work / "printed").read_text()
    words = ("accuracy", "always the most frequent", "Matthews", "precision", "recall", "many-a", "many-o")
    assert all(word in printed for word in (*words, "parameters trained, the new head's among them"))
    assert (work / "adapter" / "gaintune.json").is_file()


def test_a_classifier_is_known_as_one_without_a_task(work):
    arguments = ("evaluate", work / "base", "--adapter", work / "adapter", "--domain", work / "rule.jsonl", *QUICK)
    (figure,) = json.loads(run(*arguments, "--json"))
    assert (figure["label"], figure["scores"]["domain"]) == (str(work / "adapter"), "rule")
    assert figure["change"] is None
    assert {each["label"] for each in figure["scores"]["classes"]} == {"many-a", "many-o"}
    accuracy = f"{100 * figure['scores']['accuracy']['value']:.1f} %"
    assert accuracy in run(*arguments) and accuracy in (work / "printed").read_text()


def test_masked_perplexity_of_base_and_adapter(work):
    prose, _ = tiny_domains.write(work)
    arguments = ("evaluate", work / "base", "--adapter", work / "adapter", "--masked", "--domain", f"prose={prose}")
    sizes = ("--validation-tokens", 512, "--block-size", 64, *QUICK, "--set", "data.train_tokens=1024")
    base, adapted = json.loads(run(*arguments, *sizes, "--json"))
    assert (base["label"], base["change"]) == ("base", None) and adapted["masked"] == base["masked"] > 50
    assert adapted["change"] != 0
    assert "masked-LM perplexity" in run(*arguments, *sizes)


def test_choices_of_a_decoder(tmp_path):
    model = tiny_base.folder(tmp_path / "decoder")
    rows = [{"text": f"row {n}", "label": "good" if n % 3 else "poor"} for n in range(12)]
    file = tiny_encoders.write_rows(tmp_path / "rows.jsonl", rows)
    (figure,) = json.loads(run("evaluate", model, "--choices", f"moods={file}", *QUICK, "--json"))
    assert (figure["domain"], figure["label"], figure["rows"]) == ("moods", "base", 12)
    assert figure["majority"] == pytest.approx(8 / 12)
    printed = run("evaluate", model, "--choices", file, *QUICK)  # named after its file
    assert all(word in printed for word in ("questions", "rows", "base", "accuracy, per byte", "66.7 %"))


def test_options_that_do_not_go_together_are_refused(work):
    base, rows = work / "base", work / "rule.jsonl"
    other = [{"text": f"t{n}", "label": "new" if n % 2 else "many-a"} for n in range(40)]
    unknown = tiny_encoders.write_rows(work / "unknown.jsonl", other)
    adapted, once = ("--adapter", work / "adapter", *QUICK), "write NAME=FILE, every name once"
    for message, *arguments in (
        ("--masked measures text on its own", "--masked", "--task", "classify", "--domain", rows),
        ("--choices asks questions on its own", "--choices", f"x={rows}", "--domain", rows),
        (once, "--choices", f"x={rows}", "--choices", f"x={base}"),
        (once, "--choices", rows, "--choices", f"rule={rows}"),
        (once, "--choices", "x="),
        ("the base has no head of its own", "--task", "classify", "--domain", rows),
        (r"the labels many-a, many-o, but rows of domain 'unknown' have new", *adapted, "--domain", unknown),
    ):
        refused(ConfigError, message, run, "evaluate", base, *arguments)
    merge = (merge_adapter, work / "adapter", work / "merged")
    refused(ConfigError, "is a classifier: merging is for language models", *merge, texts=["some text"])
