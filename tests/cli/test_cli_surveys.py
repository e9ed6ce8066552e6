"""Landscapes, parts of gains and snapshots as a person asks for them: files, tables, and refusals."""

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from gaintune.cli import app
from gaintune.errors import AdapterError, ConfigError
from support import tiny_base, tiny_domains

SMALL = ["--set", "model.device=cpu", "--train-tokens", 512, "--validation-tokens", 128, "--block-size", 32]


def run(*arguments) -> str:
    """What a command prints; raises what it raises."""
    done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(each) for each in arguments])
    if done.exception is not None:
        raise done.exception
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """GAIN adapters of two domains, one of them with snapshots."""
    folder = tmp_path_factory.mktemp("surveys")
    base = tiny_base.folder(folder / "base")
    for path in tiny_domains.write(folder):
        options = ["--set", "train.snapshot_steps=2"] if path.stem == "prose" else []
        run(
            "adapt", "--model", base, "--domain", path, "--method", "gain-ffn", "--out", folder / path.stem, *SMALL,
            *options, "--lr", "0.05",
        )  # fmt: skip
    return folder


def test_each_command_writes_its_files(trained, tmp_path):
    both = [trained / "prose", trained / "code"]
    texts = ["--domain", trained / "prose.jsonl", "--domain", trained / "code.jsonl", *SMALL]
    out = tmp_path / "landscape"
    said = run("landscape", *both, "--plane", "--line", "0.5", "--grid", "0,1", *texts, "--out", out)
    assert "cosine of the two directions" in said
    figures = {f"landscape-{name}.{kind}" for name in ("lines", "plane") for kind in ("png", "svg")}
    assert {file.name for file in out.iterdir()} == figures | {f"landscape.{kind}" for kind in ("csv", "md", "json")}
    rows = pd.read_csv(out / "landscape.csv")
    assert len(rows) == 2 * 3 * 2 + 4 * 2
    assert rows[(rows["x"] == 0) & (rows["y"].isna())]["change"].eq(0).all()

    out = tmp_path / "transfer"
    said = run("transfer", *both, *texts, "--component", "mean", "--component", "principal", "--out", out)
    assert "common share of the variance" in " ".join(said.split())
    kinds = {f"transfer.{kind}" for kind in ("csv", "md", "json", "png", "svg")}
    assert {file.name for file in out.iterdir()} == {*kinds, "transfer-correlations.csv"}
    assert len(pd.read_csv(out / "transfer.csv")) == 2 * 3 * 2 * 2
    told = json.loads((out / "transfer.json").read_text())
    assert told["sharing"]["labels"] == ["prose", "code"]

    out = tmp_path / "retention"
    run(
        "retention", trained / "prose", "--domain", trained / "prose.jsonl", "--watch", trained / "code.jsonl", *SMALL,
        "--out", out,
    )  # fmt: skip
    assert {f"retention.{kind}" for kind in ("csv", "md", "json", "png", "svg")} < {file.name for file in out.iterdir()}
    assert sorted(set(pd.read_csv(out / "retention.csv")["step"])) == [0, 2, 4]


def test_what_cannot_be_done_is_one_line(trained, tmp_path):
    text = ["--domain", trained / "prose.jsonl", *SMALL, "--out", tmp_path / "out"]
    refusals = [
        (["landscape", trained / "prose", "--plane"], ConfigError, "spanned by two adapters"),
        (["landscape", trained / "prose", "--line", "a"], ConfigError, "write numbers with commas"),
        (["landscape", trained / "prose", "--line", "0.5,inf"], ConfigError, "--line 0.5,inf: .*finite number"),
        (["transfer", trained / "prose"], ConfigError, "takes two or more"),
        (["retention", trained / "code"], AdapterError, "no snapshots of it were kept"),
    ]
    for command, kind, words in refusals:
        with pytest.raises(kind, match=words) as refusal:
            run(*command, *text)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
