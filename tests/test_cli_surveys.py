"""Landscapes, parts of gains and snapshots as a person asks for them: files, tables, and refusals."""

import json

import pandas as pd
import pytest

import tiny_base
import tiny_domains
from test_cli import gaintune, refused

SMALL = ["--train-tokens", 512, "--validation-tokens", 128, "--block-size", 32]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """GAIN adapters of two domains, one of them with snapshots."""
    folder = tmp_path_factory.mktemp("surveys")
    base = tiny_base.folder(folder / "base")
    for path in tiny_domains.write(folder):
        options = ["--set", "train.snapshot_steps=2"] if path.stem == "prose" else []
        done = gaintune(
            "adapt", "--model", base, "--domain", path, "--method", "gain-ffn", "--out", folder / path.stem, *SMALL,
            *options, "--lr", "0.05",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder


def test_each_command_writes_its_files(trained, tmp_path):
    both = [trained / "prose", trained / "code"]
    texts = ["--domain", trained / "prose.jsonl", "--domain", trained / "code.jsonl", *SMALL]
    out = tmp_path / "landscape"
    done = gaintune("landscape", *both, "--plane", "--line", "0.5", "--grid", "0,1", *texts, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "cosine of the two directions" in done.stdout
    figures = {f"landscape-{name}.{kind}" for name in ("lines", "plane") for kind in ("png", "svg")}
    assert {file.name for file in out.iterdir()} == figures | {f"landscape.{kind}" for kind in ("csv", "md", "json")}
    rows = pd.read_csv(out / "landscape.csv")
    assert len(rows) == 2 * 3 * 2 + 4 * 2
    assert rows[(rows["x"] == 0) & (rows["y"].isna())]["change"].eq(0).all()

    out = tmp_path / "transfer"
    done = gaintune("transfer", *both, *texts, "--component", "mean", "--component", "principal", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "common share of the variance" in " ".join(done.stdout.split())
    kinds = {f"transfer.{kind}" for kind in ("csv", "md", "json", "png", "svg")}
    assert {file.name for file in out.iterdir()} == {*kinds, "transfer-correlations.csv"}
    assert len(pd.read_csv(out / "transfer.csv")) == 2 * 3 * 2 * 2
    told = json.loads((out / "transfer.json").read_text())
    assert told["sharing"]["labels"] == ["prose", "code"]

    out = tmp_path / "retention"
    done = gaintune(
        "retention", trained / "prose", "--domain", trained / "prose.jsonl", "--watch", trained / "code.jsonl", *SMALL,
        "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {f"retention.{kind}" for kind in ("csv", "md", "json", "png", "svg")} < {file.name for file in out.iterdir()}
    assert sorted(set(pd.read_csv(out / "retention.csv")["step"])) == [0, 2, 4]


def test_what_cannot_be_done_is_one_line(trained, tmp_path):
    text = ["--domain", trained / "prose.jsonl", *SMALL, "--out", tmp_path / "out"]
    assert "spanned by two adapters" in refused(gaintune("landscape", trained / "prose", "--plane", *text))
    assert "write numbers with commas" in refused(gaintune("landscape", trained / "prose", "--line", "a", *text))
    assert "takes two or more" in refused(gaintune("transfer", trained / "prose", *text))
    assert "no snapshots of it were kept" in refused(gaintune("retention", trained / "code", *text))
    assert not (tmp_path / "out").exists()
