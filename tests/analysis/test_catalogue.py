"""Everything that is made from an analysis: its command, its step, its files and its row in the docs."""

import json
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import typer
from matplotlib.figure import Figure
from pydantic import Field

from gaintune.analysis import ANALYSES, Analysis, Options, Result, write_result
from gaintune.analysis.base import Headline
from gaintune.cli.analyze import add_command
from gaintune.errors import ConfigError
from gaintune.recipes.steps import KINDS
from gaintune.results import Interval
from support import cli, refused

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", list(ANALYSES))
def test_an_analysis_names_its_source_and_has_a_step_and_a_row_in_the_docs(name):
    analysis = ANALYSES[name]
    assert "paper" in (type(analysis).__doc__ or ""), "the docstring names a section, table or figure"
    assert name in KINDS
    says = analysis.help.split("\n\n")[0]
    row = f"| [`{name}`](../analyses/{name}.md) | {says} | {type(analysis).__doc__} |"
    assert row in (DOCS / "reference" / "analyses.md").read_text(encoding="utf-8"), "run docs/generate.py"
    assert (DOCS / "analyses" / f"{name}.md").is_file()


class ToyOptions(Options):
    """One option."""

    times: int = Field(default=2, ge=1, description="how often")


class Toy(Analysis):
    """No paper."""

    name = "toy"
    help = "Count to a number."
    examples = "gaintune toy --times 3"
    takes = "nothing"
    Options = ToyOptions

    def run(self, subject, options, progress):
        return Result(
            headline=Headline(["what", "change", "none"], [["x", Interval(-1.25, -2.0, -0.5), None]], numeric=1),
            remarks=[f"counted to {options.times}"], tables={"toy": pd.DataFrame({"n": range(options.times)})},
            markdown="toy\n", record={"times": options.times}, provenance={"made": "here"},
            figures={"toy-figure": Figure(figsize=(1, 1)) if options.times > 1 else None},
        )  # fmt: skip


def test_a_new_analysis_has_a_command_with_its_options_its_table_and_its_files(tmp_path):
    application = typer.Typer(rich_markup_mode=None)
    add_command(application, Toy())
    add_command(application, ANALYSES["gains"])
    run = partial(cli.run, application=application, columns=100)
    help_text = run("toy", "--help")
    assert all(text in help_text for text in ("--times", "How often. [default: 2]", "gaintune toy --times 3"))
    said = run("toy", "--times", 3, "--out", tmp_path)
    assert "-1.2 % [-2.0, -0.5]" in said and "—" in said and "counted to 3" in said and f"figure {tmp_path}" in said
    names = {"toy.csv", "toy.md", "toy.json", "toy-figure.png", "toy-figure.svg"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert json.loads((tmp_path / "toy.json").read_text()) == {"times": 3, "provenance": {"made": "here"}}
    run("toy", "--times", 1, "--out", tmp_path)
    assert not list(tmp_path.glob("toy-figure.*")), "a figure of an earlier call is taken away"
    refused(ConfigError, "--times 0", run, "toy", "--times", 0, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_options_of_a_recipe_are_refused_with_their_key_and_what_was_meant():
    message = "step look: unknown key 'tims'; did you mean 'times'"
    refused(ConfigError, message, ToyOptions.read, {"tims": 3}, "step look")
    assert ToyOptions.read({"times": 3}, "step look").times == 3


def test_what_another_program_put_beside_the_files_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write_result("toy", Toy().run(None, ToyOptions(times=1), None), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
