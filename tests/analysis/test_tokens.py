"""Token changes of a survey equal those from whole logits; every method, masks of instructions, files, refusals."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from gaintune.adapters import AdapterRecord, load_adapter, save_adapter
from gaintune.analysis import Subject, TokensOptions, survey_tokens, write_result
from gaintune.analysis.tokens.report import cells, markdown, result
from gaintune.analysis.tokens.survey import scored_tokens
from gaintune.config import MethodConfig, build_plan
from gaintune.data import load_domain
from gaintune.errors import BaseMismatchError, ConfigError
from gaintune.evaluate import compare_adapters, measure, measure_tokens
from gaintune.methods import attach
from gaintune.models import load_base
from support import tiny_base, tiny_domains


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a plan over two texts and one instruction domain, and adapters with an effect."""
    folder = tmp_path_factory.mktemp("tokens")
    base = tiny_base.folder(folder / "base", dtype=torch.float32)
    rows = [{"prompt": f"What is {n} and {n}?\n", "completion": f"It is {2 * n}."} for n in range(80)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = tiny_domains.plan(base, folder)
    domains = [*values["data"]["domains"], {"name": "sums", "source": str(folder / "sums.jsonl"), "task": "instruct"}]
    values["data"] = {**values["data"], "domains": domains}
    for name in ("gain-ffn", "disel", "full"):
        adapter(base, folder / name, name)
    return folder, build_plan(values)


def adapter(base, folder, name):
    """An adapter with an effect, of parameters moved at random."""
    loaded = load_base(str(base), dtype=torch.float32)
    model = attach(loaded.model, MethodConfig(name=name, label=name), seed=0)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder, AdapterRecord(str(base), loaded.fingerprint, name, name, ("prose",)))
    return folder


def whole_losses(model, examples) -> np.ndarray:
    """Every token's loss from the logits of all rows at once, float64."""
    given = {"input_ids": examples.input_ids}
    if examples.position_ids is not None:
        given["position_ids"] = examples.position_ids
    with torch.no_grad():
        logits = model.double()(**given, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), examples.labels[:, 1:].flatten(), reduction="none")
    return losses.view(len(examples), -1).numpy()


@pytest.mark.parametrize("name", ["gain-ffn", "disel", "full"])
def test_changes_equal_those_from_whole_logits(made, name):
    folder, plan = made
    survey = survey_tokens(plan, [folder / name], TokensOptions(limit=0.5, bins=11))
    assert list(survey.changes) == ["prose", "code", "sums"]
    for domain in plan.data.domains:
        base = load_base(plan.model)
        rows = load_domain(domain, plan.data, base.tokenizer).validation
        before = whole_losses(base.model, rows)
        after = whole_losses(load_adapter(load_base(plan.model), folder / name), rows)
        scored = scored_tokens(rows)
        kept = (after - before)[scored]
        (one,) = survey.changes[domain.name].values()
        assert one.tokens == int(scored.sum()) and one.blocks == len(rows)
        assert (one.tokens < scored.size) is (domain.name == "sums")  # prompts and padding do not count
        assert one.mean.value == pytest.approx(kept.mean(), abs=1e-5)
        assert one.mean_absolute == pytest.approx(np.abs(kept).mean(), rel=1e-3)
        assert one.skew == pytest.approx(((kept - kept.mean()) ** 3).mean() / kept.std() ** 3, rel=1e-2, abs=1e-3)
        assert one.coherence.value == pytest.approx(abs(kept.mean()) / np.abs(kept).mean(), rel=1e-2, abs=1e-4)
        assert sum(one.histogram) == one.tokens and one.limit == 0.5
        assert one.mean.low <= one.mean.value <= one.mean.high


def test_the_mean_is_the_change_that_perplexity_shows(made):
    folder, plan = made
    base = load_base(plan.model)
    domain = load_domain(plan.data.domains[0], plan.data, base.tokenizer)
    tokens = measure_tokens(base.model, domain.validation, batch_size=3)
    whole = measure(base.model, domain.validation, domain.validation_bytes, batch_size=3)
    assert tokens.shape == (len(domain.validation), 31)
    assert tuple(tokens.double().sum(dim=1).tolist()) == pytest.approx(whole.nll, rel=1e-12)
    adapted = load_adapter(base, folder / "gain-ffn")
    after = measure(adapted, domain.validation, domain.validation_bytes, batch_size=3)
    (one,) = survey_tokens(plan, [folder / "gain-ffn"]).changes["prose"].values()
    assert one.mean.value == pytest.approx(after.nats_per_token - whole.nats_per_token, abs=1e-5)


def test_each_adapter_is_measured_in_its_own_numbers_as_perplexity_is(tmp_path):
    """Weights trained whole are kept in fp32, adapters leave the base in bf16: each is compared with its own base."""
    base = tiny_base.folder(tmp_path / "base")
    values = tiny_domains.plan(base, tmp_path)
    plan = build_plan({**values, "model": {**values["model"], "dtype": "bf16"}})
    folders = [adapter(base, tmp_path / name, name) for name in ("gain-ffn", "full")]
    changes = survey_tokens(plan, folders).changes.values()
    means = [each.mean.value for adapters in changes for each in adapters.values()]
    told = [each.change for each in compare_adapters(plan, folders) if each.change is not None]
    assert 100 * np.expm1(means) == pytest.approx(told, abs=1e-4)


def test_several_adapters_share_a_range_and_are_written(made, tmp_path):
    folder, plan = made
    survey = survey_tokens(plan, [folder / "gain-ffn", folder / "full"])
    assert list(survey.changes["code"]) == ["gain-ffn on prose", "full on prose"]
    for adapters in survey.changes.values():
        assert len({one.limit for one in adapters.values()}) == 1
    write_result("tokens", result(survey, Subject()), tmp_path)
    names = {f"tokens.{kind}" for kind in ("csv", "md", "json", "png", "svg")} | {"tokens-histogram.csv"}
    assert {file.name for file in tmp_path.iterdir()} == names
    table = pd.read_csv(tmp_path / "tokens.csv")
    assert len(table) == 6 and table["mean_low"].le(table["mean"]).all()
    bins = pd.read_csv(tmp_path / "tokens-histogram.csv")
    assert (
        bins.groupby(["domain", "adapter"])["tokens"].sum().tolist()
        == table.sort_values(["domain", "adapter"])["tokens"].tolist()
    )
    told = json.loads((tmp_path / "tokens.json").read_text())
    assert told["provenance"]["texts"]["prose"]["content_hash"]
    one = survey.changes["prose"]["full on prose"]
    assert told["changes"]["prose"]["full on prose"]["mean"]["value"] == one.mean.value
    assert cells("full on prose", one)[1] in markdown(survey)


def test_the_same_survey_gives_the_same_bytes(made, tmp_path):
    folder, plan = made
    for name in ("one", "two"):
        write_result("tokens", result(survey_tokens(plan, [folder / "gain-ffn"]), Subject()), tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_refusals_come_before_anything_is_measured(made, tmp_path):
    folder, plan = made
    with pytest.raises(ConfigError, match="at least one adapter"):
        survey_tokens(plan, [])
    with pytest.raises(ConfigError, match="odd number"):
        TokensOptions.read({"bins": 10}, "here")
    with pytest.raises(ConfigError, match="named twice"):
        survey_tokens(plan, [folder / "full", folder / "full"])
    other = tiny_base.folder(tmp_path / "other", seed=1, dtype=torch.float32)
    with pytest.raises(BaseMismatchError):
        survey_tokens(
            plan.model_copy(update={"model": plan.model.model_copy(update={"name": str(other)})}), [folder / "full"]
        )
