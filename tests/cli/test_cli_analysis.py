"""The commands that analyze, as a person uses them: their files, their tables, and their refusals."""

import json

import pandas as pd
import pytest

from gaintune.errors import AdapterError, ConfigError, DataError
from support import refused, tiny_base, tiny_domains
from support.cli import SMALL, run, words_of

VALIDATION = ("--validation-tokens", 128, "--block-size", 32, "--set", "data.train_tokens=256")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """GAIN-FFN adapters of two domains, one of them with snapshots, a LoRA and a DISeL adapter, and instructions."""
    folder = tmp_path_factory.mktemp("analyses")
    base = tiny_base.folder(folder / "base", head_dim=4)
    prose, code = tiny_domains.write(folder)
    rows = [{"prompt": f"What is {n} and {n}?\n", "completion": f"It is {2 * n}."} for n in range(80)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rate = ("--lr", "0.05")
    for name, domain, method, options in (
        ("prose", prose, "gain-ffn", (*rate, "--set", "train.snapshot_steps=2")),
        ("code", code, "gain-ffn", rate),
        ("lora", prose, "lora", ()),
        ("disel", prose, "disel:rank=2", ()),
    ):
        run("adapt", "--model", base, "--domain", domain, "--method", method, "--out", folder / name, *SMALL, *options)
    return folder


def files(stem: str, *kinds: str) -> set[str]:
    return {f"{stem}.{kind}" for kind in kinds or ("csv", "md", "json", "png", "svg")}


def written(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_gates_of_an_adapter_are_written_as_tables_and_figures(trained, tmp_path):
    out, adapter = tmp_path / "out", trained / "disel"
    texts = ("--domain", trained / "prose.jsonl", "--instruct", f"sums={trained / 'sums.jsonl'}")
    assert "mean gate" in run("gates", adapter, *texts, *VALIDATION, "--out", out)
    names = files("gates", "csv", "json", "md") | files("gates-layers", "csv") | files("gates-apart", "csv")
    figures = files("gate-histograms", "png", "svg") | files("gate-heatmap", "png", "svg")
    assert written(out) == names | files("gates-rows", "csv") | figures
    result = json.loads((out / "gates.json").read_text())
    record = json.loads((adapter / "gaintune.json").read_text())
    assert (result["adapter"], result["base_fingerprint"]) == (str(adapter), record["base_fingerprint"])
    assert (result["plan"]["data"]["validation_tokens"], result["plan"]["data"]["seed"]) == (128, 0)
    assert result["environment"]["packages"] == record["versions"]
    text = (out / "gates.md").read_text()
    assert f"Adapter {adapter} on {trained / 'base'} (fingerprint {record['base_fingerprint'][:12]})" in text
    assert "up to 128 tokens a domain in blocks of 32, template auto, data.seed 0; gaintune " in text
    assert result["counted"] == {"prose": "all", "sums": "response"}
    tokens = result["tokens"]
    assert tokens["prose"] == 128 and 0 < tokens["sums"] < 128
    table = pd.read_csv(out / "gates.csv")
    whole = table[(table["depth"] == "all") & (table["block"] == "all")].set_index("domain")
    assert whole["values"].to_dict() == {name: tokens[name] * 14 * 2 for name in ("prose", "sums")}
    assert whole["mean"].between(0.01, 0.2).all()  # they start near sigmoid(-3)
    layers = pd.read_csv(out / "gates-layers.csv")
    assert len(layers) == 2 * 14 * 3
    assert layers[layers["part"] == "all"]["values"].sum() == whole["values"].sum()
    apart = pd.read_csv(out / "gates-apart.csv").set_index(["domain", "less_domain", "depth", "part"])
    between = apart.loc[("prose", "sums", "all", "all")]
    assert between["difference"] == pytest.approx(whole["mean"]["prose"] - whole["mean"]["sums"])
    assert between["low"] < between["difference"] < between["high"]
    assert pd.read_csv(out / "gates-rows.csv")["values"].sum() == whole["values"].sum()
    run("gates", adapter, *texts[:2], "--tokens", "response", "--out", tmp_path / "two", *VALIDATION)
    other = pd.read_csv(tmp_path / "two" / "gates.csv")
    assert other["mean"].iloc[0] == whole["mean"]["prose"]  # every token of a text is scored


def test_linear_model_writes_its_table_and_figure(tmp_path):
    out = tmp_path / "out"
    shown = run("linear-model", "--dimension", 4, "--rank", 1, "--steps", 30, "--seeds", 2, "--out", out)
    assert "best fixed correction" in " ".join(shown.split())
    assert written(out) == files("linear-model")
    assert json.loads((out / "linear-model.json").read_text())["settings"]["steps"] == 30
    remark = "The claims presuppose 1500 training steps, the default; after 30, a NO may say"
    assert "NO " in shown and remark in shown and remark in (out / "linear-model.md").read_text()


def test_gains_shows_range_share_and_regime(trained, tmp_path):
    shown = run("gains", trained / "prose", "--out", tmp_path / "out")
    assert "1 prose" in shown and "within [0.95, 1.05]" in shown
    assert "gain-ffn: stable, every factor is positive after one stage" in shown
    assert (tmp_path / "out" / "gains-heatmap.png").stat().st_size > 1000


def test_subspace_shows_shares_and_intruders(trained, tmp_path):
    out, cpu = tmp_path / "out", ("--set", "model.device=cpu", "--out", tmp_path / "out")
    shown = run("subspace", trained / "prose", trained / "lora", "--top", 4, "--epsilon", 0.6, *cpu)
    assert "by construction" in shown and "below 0.6" in shown
    result = json.loads((out / "subspace.json").read_text())
    gains, lora = result["adapters"]
    assert gains["outside"] < 1e-25 and lora["outside"] > 0.05
    assert result["settings"] == {"top": 4, "epsilon": 0.6, "leading": 0.9, "tolerance": None}
    assert "every gate held at 0.05" in run("subspace", trained / "disel", "--gate", 0.05, *cpu)
    run("subspace", trained / "prose", trained / "lora", "--relative-update", 0.3, *cpu)
    scaled = [adapter["scaled"] for adapter in json.loads((out / "subspace.json").read_text())["adapters"]]
    assert [each["relative_update"] for each in scaled] == pytest.approx([0.3, 0.3])


def test_tokens_shows_mean_skew_and_coherence(trained, tmp_path, caplog):
    text = ["--domain", trained / "prose.jsonl", *SMALL[:2], *SMALL[4:]]  # of SMALL all but the training tokens
    both, size = [trained / "prose", trained / "lora"], ("--set", "data.train_tokens=512")
    shown = run("tokens", *both, *text, *size, "--out", tmp_path)
    assert "coherence" in shown and "lora on prose" in shown
    result = json.loads((tmp_path / "tokens.json").read_text())
    assert set(result["changes"]["prose"]) == {"gain-ffn on prose", "lora on prose"}
    assert result["changes"]["prose"]["lora on prose"]["tokens"] == 4 * 31
    assert not [record for record in caplog.records if "trained on prose of other text" in record.message]


def test_tokens_takes_the_trained_domains_and_texts_to_watch_as_other_surveys_do(trained, tmp_path):
    help_text = words_of("tokens")
    assert all(option in help_text for option in ("--plan", "--watch", "--train-tokens", "--text-column"))
    assert "those that the adapters were trained on last, unless" in help_text
    out, plan = tmp_path / "out", tmp_path / "plan.yaml"
    refused(DataError, "prose", run, "tokens", trained / "lora", *SMALL, "--out", out)  # the name stands for no text
    plan.write_text(
        f"model: {{name: {trained / 'base'}, device: cpu}}\n"
        f"data: {{domains: [{trained / 'prose.jsonl'}], train_tokens: 512, validation_tokens: 128, block_size: 32}}\n"
    )
    run("tokens", trained / "lora", "--plan", plan, "--watch", trained / "code.jsonl", "--out", out)
    assert list(json.loads((out / "tokens.json").read_text())["changes"]) == ["code", "prose"]


def test_tokens_warns_of_text_that_an_adapter_may_have_seen(trained, tmp_path, caplog):
    text = ["--domain", trained / "prose.jsonl", *SMALL[:2], "--validation-tokens", 64, "--block-size", 32]
    run("tokens", trained / "lora", *text, "--set", "data.train_tokens=256", "--out", tmp_path)
    (warning,) = [record.message for record in caplog.records if "other text" in record.message]
    assert "trained on prose of other text, or cut to other sizes" in warning


def test_landscape_transfer_and_retention_write_their_files(trained, tmp_path):
    both = [trained / "prose", trained / "code"]
    texts = ["--domain", trained / "prose.jsonl", "--domain", trained / "code.jsonl", *SMALL]
    out = tmp_path / "landscape"
    shown = run("landscape", *both, "--plane", "--line", "0.5", "--grid", "0,1", *texts, "--out", out)
    assert "cosine of the two directions" in shown
    figures = files("landscape-lines", "png", "svg") | files("landscape-plane", "png", "svg")
    assert written(out) == files("landscape", "csv", "md", "json") | figures
    rows = pd.read_csv(out / "landscape.csv")
    assert len(rows) == 2 * 3 * 2 + 4 * 2
    assert rows[(rows["x"] == 0) & (rows["y"].isna())]["change"].eq(0).all()
    out = tmp_path / "transfer"
    shown = run("transfer", *both, *texts, "--component", "mean", "--component", "principal", "--out", out)
    assert "common share of the variance" in " ".join(shown.split())
    assert written(out) == files("transfer") | {"transfer-correlations.csv"}
    assert len(pd.read_csv(out / "transfer.csv")) == 2 * 3 * 2 * 2
    assert json.loads((out / "transfer.json").read_text())["sharing"]["labels"] == ["prose", "code"]
    out = tmp_path / "retention"
    run("transfer", *both, *texts, "--control", "signs", "--control", "norm", "--out", out)
    assert {*pd.read_csv(out / "transfer.csv")["part"]} == {"whole", "shared", "own", "signs", "norm"}
    texts = ("--domain", trained / "prose.jsonl", "--watch", trained / "code.jsonl")
    run("retention", trained / "prose", *texts, *SMALL, "--out", out)
    assert files("retention") < written(out)
    assert sorted(set(pd.read_csv(out / "retention.csv")["step"])) == [0, 2, 4]


@pytest.mark.parametrize(("words", "kind", "message"), [
    ("gates lora", AdapterError, "method lora has no gates"),
    ("gates missing", AdapterError, "no such adapter folder"),
    ("gates disel --tokens some", ConfigError, "'auto', 'response' or 'all'"),
    ("gates disel --domain prose.jsonl --bins 7", ConfigError, "multiple of 20"),
    ("gains lora", AdapterError, "method lora has no gains"),
    ("gains .", AdapterError, "not an adapter"),
    ("subspace disel", AdapterError, "token by token"),
    ("subspace lora --epsilon 2", ConfigError, r"--epsilon 2\.0: .* less than or equal to 1"),
    ("linear-model --dimension 4 --rank 9", ConfigError, "rank is 9"),
    ("tokens lora --bins 10", ConfigError, "odd number"),
    ("tokens missing", AdapterError, "no such adapter folder"),
    ("landscape prose --domain prose.jsonl --plane", ConfigError, "spanned by two adapters"),
    ("landscape prose --domain prose.jsonl --line a", ConfigError, "write numbers with commas"),
    ("landscape prose --domain prose.jsonl --line 0.5,inf", ConfigError, "--line 0.5,inf: .*finite number"),
    ("transfer prose --domain prose.jsonl", ConfigError, "takes two or more"),
    ("retention code --domain prose.jsonl", AdapterError, "no snapshots of it were kept"),
])  # fmt: skip
def test_what_cannot_be_analyzed_is_refused_in_one_line(trained, tmp_path, monkeypatch, words, kind, message):
    monkeypatch.chdir(trained)
    with pytest.raises(kind, match=message) as refusal:
        run(*words.split(), "--out", tmp_path / "out")
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()
