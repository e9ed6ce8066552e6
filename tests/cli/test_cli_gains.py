"""gaintune gains, subspace and tokens as a person asks for them: their files, their tables, and their refusals."""

import json

import pytest
from test_cli_surveys import SMALL, run

from gaintune.errors import AdapterError, ConfigError, DataError
from support import tiny_base, tiny_domains


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny base, a domain, and a GAIN-FFN, a LoRA and a DISeL adapter on it."""
    folder = tmp_path_factory.mktemp("gains")
    base = tiny_base.folder(folder / "base", head_dim=4)
    prose, _ = tiny_domains.write(folder)
    for method in ("gain-ffn", "lora", "disel:rank=2"):
        place = folder / method.partition(":")[0]
        run("adapt", "--model", base, "--domain", prose, "--method", method, "--out", place, *SMALL)
    return folder


def test_gains_tells_range_share_and_regime(trained, tmp_path):
    said = run("gains", trained / "gain-ffn", "--out", tmp_path / "out")
    assert "1 prose" in said and "within [0.95, 1.05]" in said
    assert "gain-ffn: stable, every factor is positive after one stage" in said
    assert (tmp_path / "out" / "gains-heatmap.png").stat().st_size > 1000
    with pytest.raises(AdapterError, match="method lora has no gains"):
        run("gains", trained / "lora", "--out", tmp_path / "two")
    with pytest.raises(AdapterError, match="not an adapter"):
        run("gains", tmp_path, "--out", tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_subspace_tells_shares_and_intruders(trained, tmp_path):
    out = tmp_path / "out"
    both = [trained / "gain-ffn", trained / "lora"]
    said = run("subspace", *both, "--top", 4, "--epsilon", 0.6, "--set", "model.device=cpu", "--out", out)
    assert "by construction" in said and "below 0.6" in said
    told = json.loads((out / "subspace.json").read_text())
    gains, lora = told["adapters"]
    assert gains["outside"] < 1e-25 and lora["outside"] > 0.05
    assert told["settings"] == {"top": 4, "epsilon": 0.6, "leading": 0.9, "tolerance": None}


def test_subspace_asks_at_which_value_gates_are_held(trained, tmp_path):
    with pytest.raises(AdapterError, match="token by token"):
        run("subspace", trained / "disel", "--out", tmp_path)
    said = run("subspace", trained / "disel", "--gate", 0.05, "--set", "model.device=cpu", "--out", tmp_path)
    assert "every gate held at 0.05" in said
    with pytest.raises(ConfigError, match=r"--epsilon 2\.0: .* less than or equal to 1"):
        run("subspace", trained / "lora", "--epsilon", 2)


def test_tokens_tells_mean_skew_and_coherence(trained, tmp_path, caplog):
    text = ["--domain", trained / "prose.jsonl", *SMALL[:2], *SMALL[4:]]  # of SMALL all but the training tokens
    out = tmp_path / "out"
    said = run("tokens", trained / "gain-ffn", trained / "lora", *text, "--set", "data.train_tokens=512", "--out", out)
    assert "coherence" in said and "lora on prose" in said
    told = json.loads((out / "tokens.json").read_text())
    assert set(told["changes"]["prose"]) == {"gain-ffn on prose", "lora on prose"}
    assert told["changes"]["prose"]["lora on prose"]["tokens"] == 4 * 31
    assert not [record for record in caplog.records if "trained on prose of other text" in record.message]
    with pytest.raises(ConfigError, match="odd number"):
        run("tokens", trained / "lora", "--bins", 10)
    with pytest.raises(AdapterError, match="no such adapter folder"):
        run("tokens", tmp_path / "missing")


def test_tokens_takes_what_the_adapters_learnt_and_texts_to_watch_as_other_surveys_do(trained, tmp_path):
    told = " ".join(run("tokens", "--help").replace("│", " ").split())
    assert all(option in told for option in ("--plan", "--watch", "--train-tokens", "--text-column"))
    assert "those that the adapters learnt last, unless" in told
    with pytest.raises(DataError, match="prose"):  # learnt under a name that stands for no text
        run("tokens", trained / "lora", *SMALL, "--out", tmp_path)
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"model: {{name: {trained / 'base'}, device: cpu}}\n"
        f"data: {{domains: [{trained / 'prose.jsonl'}], train_tokens: 512, validation_tokens: 128, block_size: 32}}\n"
    )
    out = tmp_path / "out"
    run("tokens", trained / "lora", "--plan", plan, "--watch", trained / "code.jsonl", "--out", out)
    assert list(json.loads((out / "tokens.json").read_text())["changes"]) == ["code", "prose"]


def test_tokens_warns_of_text_that_an_adapter_may_have_seen(trained, tmp_path, caplog):
    text = ["--domain", trained / "prose.jsonl", *SMALL[:2], "--validation-tokens", 64, "--block-size", 32]
    run("tokens", trained / "lora", *text, "--set", "data.train_tokens=256", "--out", tmp_path)
    (warning,) = [record.message for record in caplog.records if "other text" in record.message]
    assert "trained on prose of other text, or cut to other sizes" in warning
