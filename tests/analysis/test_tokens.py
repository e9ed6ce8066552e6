"""Token changes equal those from whole logits, their figures ones computed token by token; intervals; refusals."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from gaintune.adapters import load_adapter
from gaintune.analysis import Subject, TokensOptions, survey_tokens, write_result
from gaintune.analysis.tokens.report import cells, markdown, result
from gaintune.analysis.tokens.survey import BINS, range_of, scored_tokens, summarize_changes
from gaintune.config import build_plan
from gaintune.data import load_domain
from gaintune.errors import BaseMismatchError, ConfigError, DataError
from gaintune.evaluate import compare_adapters, measure, measure_tokens
from gaintune.models import load_base
from support import refused, tiny_adapters, tiny_base, tiny_domains
from support.files import write_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a plan over two texts and one instruction domain, and adapters with an effect."""
    folder = tmp_path_factory.mktemp("tokens")
    base = tiny_base.folder(folder / "base", dtype=torch.float32)
    rows = [{"prompt": f"What is {n} and {n}?\n", "completion": f"It is {2 * n}."} for n in range(80)]
    sums = {"name": "sums", "source": str(write_rows(folder / "sums.jsonl", rows)), "task": "instruct"}
    values = tiny_domains.plan(base, folder)
    values["data"]["domains"].append(sums)
    for name in ("gain-ffn", "disel", "full"):
        adapter(base, folder / name, name)
    return folder, build_plan(values)


def adapter(base, folder, name):
    return tiny_adapters.save(base, folder, name, scale=0.05)


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
    after = measure(load_adapter(base, folder / "gain-ffn"), domain.validation, domain.validation_bytes, batch_size=3)
    (one,) = survey_tokens(plan, [folder / "gain-ffn"]).changes["prose"].values()
    assert one.mean.value == pytest.approx(after.nats_per_token - whole.nats_per_token, abs=1e-5)


def test_each_adapter_is_measured_in_its_own_precision_as_perplexity_is(tmp_path):
    """Weights trained whole are kept in fp32, adapters leave the base in bf16: each is compared with its own base."""
    base = tiny_base.folder(tmp_path / "base")
    plan = build_plan(tiny_domains.plan(base, tmp_path, model={"dtype": "bf16"}))
    folders = [adapter(base, tmp_path / name, name) for name in ("gain-ffn", "full")]
    changes = survey_tokens(plan, folders).changes.values()
    means = [each.mean.value for adapters in changes for each in adapters.values()]
    expected = [each.change for each in compare_adapters(plan, folders) if each.change is not None]
    assert 100 * np.expm1(means) == pytest.approx(expected, abs=1e-4)


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
    sums = pd.read_csv(tmp_path / "tokens-histogram.csv").groupby(["domain", "adapter"])["tokens"].sum().tolist()
    assert sums == table.sort_values(["domain", "adapter"])["tokens"].tolist()
    saved = json.loads((tmp_path / "tokens.json").read_text())
    assert saved["provenance"]["texts"]["prose"]["content_hash"]
    one = survey.changes["prose"]["full on prose"]
    assert saved["changes"]["prose"]["full on prose"]["mean"]["value"] == one.mean.value
    assert cells("full on prose", one)[1] in markdown(survey)


def test_the_same_survey_gives_the_same_bytes(made, tmp_path):
    folder, plan = made
    for name in ("one", "two"):
        write_result("tokens", result(survey_tokens(plan, [folder / "gain-ffn"]), Subject()), tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_refusals_come_before_anything_is_measured(made, tmp_path):
    folder, plan = made
    refused(ConfigError, "at least one adapter", survey_tokens, plan, [])
    refused(ConfigError, "odd number", TokensOptions.read, {"bins": 10}, "here")
    refused(ConfigError, "named twice", survey_tokens, plan, [folder / "full", folder / "full"])
    other = tiny_base.folder(tmp_path / "other", seed=1, dtype=torch.float32)
    elsewhere = plan.model_copy(update={"model": plan.model.model_copy(update={"name": str(other)})})
    refused(BaseMismatchError, "was trained on", survey_tokens, elsewhere, [folder / "full"])


def changes(rows: int = 12, tokens: int = 40, seed: int = 0, shift: float = 0.05):
    """Skewed changes, and a mask that leaves some tokens out."""
    generator = np.random.default_rng(seed)
    values = generator.gamma(2.0, 0.3, (rows, tokens)) - 0.6 + shift
    return values, generator.random((rows, tokens)) < 0.8


def test_every_figure_equals_one_computed_token_by_token():
    values, scored = changes()
    kept = [float(v) for row, mask in zip(values, scored, strict=True) for v, m in zip(row, mask, strict=True) if m]
    count = len(kept)
    mean = math.fsum(kept) / count
    moments = [math.fsum((each - mean) ** power for each in kept) / count for power in (2, 3)]
    size = math.fsum(map(abs, kept)) / count
    one = summarize_changes(values, scored, limit=1.0)
    assert (one.tokens, one.blocks) == (count, 12)
    assert one.mean.value == pytest.approx(mean) and one.mean_absolute == pytest.approx(size)
    assert one.deviation == pytest.approx(moments[0] ** 0.5)
    assert one.skew == pytest.approx(moments[1] / moments[0] ** 1.5) and one.skew > 0.5
    assert one.coherence.value == pytest.approx(abs(mean) / size)
    assert one.better == sum(each < 0 for each in kept) / count
    assert one.worse == sum(each > 0 for each in kept) / count
    assert one.quantiles[3] == pytest.approx(sorted(kept)[count // 2], abs=0.05)
    assert one.mean.low < mean < one.mean.high and one.coherence.low <= one.coherence.value <= one.coherence.high


def test_histogram_bins_are_centred_on_zero_and_hold_everything():
    values = np.array([[0.0, 0.004, -0.006, 0.99, 5.0, -7.0, -1.0, 1.0]])
    one = summarize_changes(values, np.ones((1, 8), bool), limit=1.0)
    assert len(one.histogram) == BINS and sum(one.histogram) == 8
    assert one.histogram[BINS // 2] == 3  # |change| below 1 / 101
    assert one.histogram[0] == 2 and one.histogram[-1] == 3


def test_symmetric_changes_have_no_coherence_and_one_sided_ones_all():
    half = np.abs(np.random.default_rng(1).normal(size=(6, 50)))
    scored = np.ones((6, 100), bool)
    symmetric = summarize_changes(np.concatenate([half, -half], axis=1), scored, limit=1.0)
    assert symmetric.coherence.value == pytest.approx(0, abs=1e-12) and symmetric.skew == pytest.approx(0, abs=1e-9)
    noise = summarize_changes(np.random.default_rng(4).normal(size=(20, 30)), np.ones((20, 30), bool), limit=1.0)
    assert noise.mean.low < 0 < noise.mean.high and noise.coherence.low == 0 < noise.coherence.high < 0.3
    coherent = summarize_changes(np.concatenate([half, half], axis=1), scored, limit=1.0)
    assert coherent.coherence.value == coherent.coherence.low == coherent.coherence.high == 1.0
    assert coherent.worse == 1.0


def test_the_base_against_itself_is_exactly_zero_and_one_block_has_no_interval():
    one = summarize_changes(np.array([[0.1, 0.2, -0.1]]), np.ones((1, 3), bool), limit=1.0)
    assert one.mean.low is None and one.mean.high is None and one.coherence.low is None
    one = summarize_changes(np.zeros((3, 5)), np.ones((3, 5), bool), limit=1.0)
    assert (one.mean.value, one.mean.low, one.mean.high, one.mean_absolute) == (0, 0, 0, 0)
    assert one.skew is None and one.coherence is None and one.better == one.worse == 0
    assert one.histogram[BINS // 2] == 15 and range_of([np.zeros(5)]) == 1.0


def test_the_interval_resamples_blocks_and_not_tokens():
    """Tokens of a block that move together leave as much doubt as there are blocks."""
    blocks = np.random.default_rng(2).normal(size=(10, 1))
    few = summarize_changes(blocks, np.ones((10, 1), bool), limit=1.0, domain="law")
    many = summarize_changes(np.repeat(blocks, 50, axis=1), np.ones((10, 50), bool), limit=1.0, domain="law")
    assert (many.mean.low, many.mean.high) == pytest.approx((few.mean.low, few.mean.high))
    other = summarize_changes(blocks, np.ones((10, 1), bool), limit=1.0, domain="law", seed=1)
    assert other.mean.low != few.mean.low and other.mean.value == few.mean.value


@pytest.mark.slow
def test_the_interval_covers_the_true_mean_at_about_its_confidence():
    generator, hits = np.random.default_rng(3), 0
    for _ in range(200):
        blocks = generator.normal(0.1, 0.3, (40, 1)) + generator.normal(0, 1, (40, 8))
        one = summarize_changes(blocks, np.ones((40, 8), bool), limit=1.0, samples=300)
        hits += one.mean.low <= 0.1 <= one.mean.high
    assert 182 <= hits <= 199  # 190 expected, 3.1 standard deviation


def test_wrong_arguments_are_refused():
    values, _ = changes(2, 3)
    for key, wrong in (("bins", 100), ("bins", 1), ("limit", 0.0), ("limit", -1.0)):
        options = {"limit": 1.0, key: wrong}
        refused(ConfigError, f"{key} is {wrong}", summarize_changes, values, np.ones((2, 3), bool), **options)
    refused(DataError, "mask", summarize_changes, values, np.ones((3, 2), bool), limit=1.0)
    empty = np.array([[True] * 3, [False] * 3])
    refused(DataError, "a scored token in each row", summarize_changes, values, empty, limit=1.0)
    refused(DataError, "not finite", summarize_changes, np.full((2, 3), np.nan), np.ones((2, 3), bool), limit=1.0)
