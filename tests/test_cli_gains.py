"""gaintune gains, subspace and tokens as a person uses them: their files, their tables, and their refusals."""

import json

import pytest

import tiny_base
import tiny_domains
from test_cli import gaintune, refused


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny base, a domain, and a GAIN-FFN, a LoRA and a DISeL adapter on it."""
    folder = tmp_path_factory.mktemp("gains")
    base = tiny_base.folder(folder / "base", head_dim=4)
    prose, _ = tiny_domains.write(folder)
    small = ["--train-tokens", 512, "--validation-tokens", 128, "--block-size", 32]
    for method in ("gain-ffn", "lora", "disel:rank=2"):
        name = method.partition(":")[0]
        done = gaintune("adapt", "--model", base, "--domain", prose, "--method", method, "--out", folder / name, *small)
        assert done.returncode == 0, done.stderr
    return folder


def test_gains_tells_range_share_and_regime(trained, tmp_path):
    done = gaintune("gains", trained / "gain-ffn", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "1 prose" in done.stdout and "within [0.95, 1.05]" in done.stdout
    assert "gain-ffn: stable, every factor is positive after one stage" in done.stdout
    assert (tmp_path / "out" / "gains-heatmap.png").stat().st_size > 1000
    assert "method lora has no gains" in refused(gaintune("gains", trained / "lora", "--out", tmp_path / "two"))
    assert "not an adapter" in refused(gaintune("gains", tmp_path))
    assert not (tmp_path / "two").exists()


def test_subspace_tells_shares_and_intruders(trained, tmp_path):
    out = tmp_path / "out"
    done = gaintune("subspace", trained / "gain-ffn", trained / "lora", "--top", 4, "--epsilon", 0.6, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "by construction" in done.stdout and "below 0.6" in done.stdout
    told = json.loads((out / "subspace.json").read_text())
    gains, lora = told["adapters"]
    assert gains["outside"] < 1e-25 and lora["outside"] > 0.05
    assert told["settings"] == {"top": 4, "epsilon": 0.6, "leading": 0.9, "tolerance": None}
    assert "token by token" in refused(gaintune("subspace", trained / "disel", "--out", tmp_path / "two"))
    held = gaintune("subspace", trained / "disel", "--gate", 0.05, "--out", tmp_path / "two")
    assert held.returncode == 0, held.stderr
    assert "every gate held at 0.05" in held.stdout
    assert "epsilon is 2.0" in refused(gaintune("subspace", trained / "lora", "--epsilon", 2))


def test_tokens_tells_mean_skew_and_coherence(trained, tmp_path):
    out = tmp_path / "out"
    done = gaintune(
        "tokens", trained / "gain-ffn", trained / "lora", "--domain", trained / "prose.jsonl",
        "--validation-tokens", 128, "--block-size", 32, "--set", "data.train_tokens=256", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "coherence" in done.stdout and "lora on prose" in done.stdout
    told = json.loads((out / "tokens.json").read_text())
    assert set(told["changes"]["prose"]) == {"gain-ffn on prose", "lora on prose"}
    assert told["changes"]["prose"]["lora on prose"]["tokens"] == 4 * 31
    assert "odd number" in refused(gaintune("tokens", trained / "lora", "--bins", 10))
    assert "no such adapter folder" in refused(gaintune("tokens", tmp_path / "missing"))
