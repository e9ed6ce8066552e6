"""The commands that analyse, as a person uses them: their files, their tables, and their refusals."""

import json

import pandas as pd
import pytest
from test_cli import gaintune, refused

from support import tiny_base, tiny_domains


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny base's folder of domains and instructions, a DISeL and a LoRA adapter on it."""
    folder = tmp_path_factory.mktemp("gates")
    base = tiny_base.folder(folder / "base")
    prose, _ = tiny_domains.write(folder)
    rows = [{"prompt": f"What is {n} and {n}?\n", "completion": f"It is {2 * n}."} for n in range(80)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["--train-tokens", 512, "--validation-tokens", 128, "--block-size", 32]
    for method in ("disel:rank=2", "lora"):
        name = method.partition(":")[0]
        done = gaintune("adapt", "--model", base, "--domain", prose, "--method", method, "--out", folder / name, *small)
        assert done.returncode == 0, done.stderr
    return folder


def test_gates_of_an_adapter_are_written_as_tables_and_figures(trained, tmp_path):
    out = tmp_path / "out"
    done = gaintune(
        "gates", trained / "disel", "--domain", trained / "prose.jsonl", "--instruct", f"sums={trained / 'sums.jsonl'}",
        "--validation-tokens", 128, "--block-size", 32, "--set", "data.train_tokens=256", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mean gate" in done.stdout
    stems = {"gates": ("csv", "json", "md"), "gates-layers": ("csv",), "gates-apart": ("csv",), "gates-rows": ("csv",)}
    figures = {f"gate-{name}.{kind}" for name in ("histograms", "heatmap") for kind in ("png", "svg")}
    assert {file.name for file in out.iterdir()} == figures | {f"{a}.{b}" for a, kinds in stems.items() for b in kinds}
    told = json.loads((out / "gates.json").read_text())
    assert told["adapter"] == str(trained / "disel")
    record = json.loads((trained / "disel" / "gaintune.json").read_text())
    assert told["base_fingerprint"] == record["base_fingerprint"]
    assert (told["plan"]["data"]["validation_tokens"], told["plan"]["data"]["seed"]) == (128, 0)
    assert told["environment"]["packages"] == record["versions"]
    said = (out / "gates.md").read_text()
    assert f"Adapter {trained / 'disel'} on {trained / 'base'} (fingerprint {record['base_fingerprint'][:12]})" in said
    assert "up to 128 tokens a domain in blocks of 32, template auto, data.seed 0; gaintune " in said
    assert told["counted"] == {"prose": "all", "sums": "response"}
    assert told["tokens"]["prose"] == 128
    assert 0 < told["tokens"]["sums"] < 128
    table = pd.read_csv(out / "gates.csv")
    whole = table[(table["depth"] == "all") & (table["block"] == "all")].set_index("domain")
    assert whole["values"].to_dict() == {name: told["tokens"][name] * 14 * 2 for name in ("prose", "sums")}
    assert whole["mean"].between(0.01, 0.2).all()  # they start near sigmoid(-3)
    layers = pd.read_csv(out / "gates-layers.csv")
    assert len(layers) == 2 * 14 * 3
    assert layers[layers["part"] == "all"]["values"].sum() == whole["values"].sum()
    apart = pd.read_csv(out / "gates-apart.csv").set_index(["domain", "less_domain", "depth", "part"])
    between = apart.loc[("prose", "sums", "all", "all")]
    assert between["difference"] == pytest.approx(whole["mean"]["prose"] - whole["mean"]["sums"])
    assert between["low"] < between["difference"] < between["high"]
    assert pd.read_csv(out / "gates-rows.csv")["values"].sum() == whole["values"].sum()
    again = gaintune(
        "gates", trained / "disel", "--domain", trained / "prose.jsonl", "--tokens", "response",
        "--out", tmp_path / "two", "--validation-tokens", 128, "--block-size", 32, "--set", "data.train_tokens=256",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    other = pd.read_csv(tmp_path / "two" / "gates.csv")
    assert other["mean"].iloc[0] == whole["mean"]["prose"]  # every token of a text is scored


def test_gates_refuses_what_has_none_in_one_line(trained, tmp_path):
    assert "method lora has no gates" in refused(gaintune("gates", trained / "lora", "--out", tmp_path / "out"))
    assert "no such adapter folder" in refused(gaintune("gates", tmp_path / "missing"))
    assert "'auto', 'response' or 'all'" in refused(gaintune("gates", trained / "disel", "--tokens", "some"))
    assert "multiple of 20" in refused(
        gaintune("gates", trained / "disel", "--domain", trained / "prose.jsonl", "--bins", 7, "--block-size", 32,
                 "--validation-tokens", 128, "--set", "data.train_tokens=256")
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_linear_model_writes_its_table_and_figure(tmp_path):
    out = tmp_path / "out"
    done = gaintune("linear-model", "--dimension", 4, "--rank", 1, "--steps", 30, "--seeds", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "best fixed correction" in " ".join(done.stdout.split())
    assert {file.name for file in out.iterdir()} == {
        f"linear-model.{kind}" for kind in ("csv", "json", "md", "png", "svg")
    }
    assert json.loads((out / "linear-model.json").read_text())["settings"]["steps"] == 30
    said = "The claims presuppose 1500 training steps, the default; after 30, a NO may say"
    assert "NO " in done.stdout and said in done.stdout and said in (out / "linear-model.md").read_text()
    assert "rank is 9" in refused(gaintune("linear-model", "--dimension", 4, "--rank", 9))


def test_help_shows_defaults_and_units():
    told = " ".join(gaintune("linear-model", "--help").stdout.replace("│", " ").split())
    assert "in standard deviations. [default: 3.0]" in told
    told = " ".join(gaintune("gates", "--help").stdout.replace("│", " ").split())
    assert "[default: runs/gates]" in told and "[default: auto]" in told
