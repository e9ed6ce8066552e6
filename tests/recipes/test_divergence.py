"""A recipe in which a method or a rate diverges: the rest is done and judged, and what diverged decides nothing."""

import json

from gaintune.recipes import Recipe, run_recipe

BREAKS = {"name": "lora", "lr": 1e36, "alpha": 1e4}


def claim(number: str) -> dict:
    return {"says": number, "number": number, "expect": {"below": 1e6}}


def recipe(*steps, claims) -> Recipe:
    named = [{"name": name, "do": kind, "settings": settings} for name, kind, settings in steps]
    values = {"id": "MINE", "title": "t", "source": "s", "asks": "a", "model": "m", "steps": named}
    return Recipe.model_validate({**values, "claims": list(map(claim, claims)), "scales": {}})


def test_a_method_that_diverges_leaves_the_others_with_their_verdicts(tmp_path):
    mine = recipe(
        ("run", "sequence", {"domains": ["pubmedqa", "wikitext"], "methods": [BREAKS, "gain", "gain-ffn"]}),
        ("spaces", "subspace", {"of": "run", "labels": ["gain", "lora"]}),
        claims=("run.gain.in_domain", "run.lora.in_domain", "run.lora-minus-gain.in_domain", "spaces.lora.intruders"),
    )
    result = run_recipe(mine, tmp_path / "run", scale="smoke")
    assert [finding.verdict for finding in result.findings] == ["reproduced", *["undecided"] * 3]
    run = result.outcomes["run"]
    assert list(run.diverged) == ["lora"] and run.labels == ("gain", "gain-ffn")
    assert not [name for name in run.numbers if "lora" in name]
    spaces = result.outcomes["spaces"].numbers
    assert "gain.intruders" in spaces and not [name for name in spaces if "lora" in name]
    assert "lora diverged, and claims about it are undecided: the" in (tmp_path / "run" / "results.md").read_text()


def test_a_rate_that_diverges_leaves_its_method_without_a_worst(tmp_path):
    mine = recipe(
        (
            "rates",
            "sweep",
            {
                "domains": ["pubmedqa", "wikitext"],
                "methods": [{"name": "lora", "alpha": 1e4, "rank": 1}, "gain"],
                "rates": {"lora": [1e-7, 1e36], "gain": [0.001, 0.01]},
            },
        ),
        claims=("rates.lora.worst", "rates.lora.best", "rates.gain.worst", "rates.lora@1e+36.in_domain"),
    )
    result = run_recipe(mine, tmp_path / "run", scale="smoke")
    found = {finding.claim.number: finding.number for finding in result.findings}
    assert [number for number, one in found.items() if one is None] == [
        "rates.lora.worst",
        "rates.lora@1e+36.in_domain",
    ]
    told = json.loads((tmp_path / "run" / "results.json").read_text())
    assert told["without"]["rates.lora.worst"] == "1 run at 1e+36 diverged"
    assert any("lora at 1e+36: 1 run" in note for note in told["notes"]["rates"])
