"""Scores of base and adapters on benchmarks: measured once, kept by what decides them, and paired row by row."""

import importlib.metadata
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from gaintune.adapters import AdapterRecord, attached, load_adapter, save_adapter
from gaintune.config import MethodConfig, ModelConfig
from gaintune.errors import AdapterError, BaseMismatchError, ConfigError
from gaintune.evaluate.benchmarks import (
    BenchmarkConfig,
    BenchmarkScore,
    benchmark_adapters,
    counting_score,
    load_suite,
    mean_difference,
    run_benchmarks,
)
from gaintune.evaluate.benchmarks import base_of as base_of_report
from gaintune.evaluate.benchmarks.records import TaskFacts, compare_scores, find_score
from gaintune.evaluate.benchmarks.run import compare_benchmarks, measure_benchmarks
from gaintune.methods import attach
from gaintune.models import load_base
from gaintune.results import Interval
from support import refused, tiny_base, tiny_benchmarks
from support.benchmark_world import NAMES, ROWS, Watch, adapter, base_of, config_of, edit, logits
from support.files import write_rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_base.folder(tmp_path_factory.mktemp("base") / "tiny", dtype=torch.float32, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in NAMES:
        write_rows(folder / f"{name}.jsonl", tiny_benchmarks.hub_rows(name, ROWS))
    return folder


def measured(*arguments, **options):
    """Run benchmarks, and return their report and the titles of what was measured anew."""
    watch = Watch()
    return run_benchmarks(*arguments, progress=watch, **options), watch.titles


def test_a_base_is_measured_once_for_all_its_adapters(tiny, data, tmp_path):
    first, second = (adapter(tiny, tmp_path / f"{seed}", "gain-ffn", seed) for seed in (1, 2))
    config, cache = config_of(data), tmp_path / "cache"
    report, titles = measured(base_of(tiny), {"one": first}, config, cache=cache)
    assert titles == [f"{label}: {name}" for label in ("base", "one") for name in NAMES]
    again, titles = measured(base_of(tiny), {"one": first, "two": second}, config, cache=cache)
    assert titles == [f"two: {name}" for name in NAMES]
    assert (again.base, again.adapted["one"]) == (report.base, report.adapted["one"])
    assert again.comparisons[: len(report.comparisons)] == report.comparisons


@pytest.mark.parametrize("changes", [{"limit": 5}, {"fewshot": 2}, {"fewshot": 2, "seed": 7}, {"batch_size": 3}])
def test_other_settings_are_measured_anew(tiny, data, tmp_path, changes):
    cache = tmp_path / "cache"
    run_benchmarks(base_of(tiny), {}, config_of(data, fewshot=2 if "seed" in changes else None), cache=cache)
    assert len(measured(base_of(tiny), {}, config_of(data, **changes), cache=cache)[1]) == len(NAMES)


def test_scores_belong_to_the_weights_and_the_precision(tiny, data, tmp_path):
    """Another base, and the same in another precision, are measured; a copy of a base under another name is not."""
    first = run_benchmarks(base_of(tiny), {}, config_of(data), cache=tmp_path / "cache")
    copy = shutil.copytree(tiny, tmp_path / "copy")
    other = tiny_base.folder(tmp_path / "other", seed=1, dtype=torch.float32, max_position_embeddings=1024)
    for folder, dtype, anew in ((copy, "fp32", 0), (other, "fp32", len(NAMES)), (tiny, "bf16", len(NAMES))):
        base = load_base(ModelConfig(name=str(folder), device="cpu", dtype=dtype))
        report, titles = measured(base, {}, config_of(data), cache=tmp_path / "cache")
        assert ((report.base == first.base), len(titles)) == (folder == copy, anew)


def test_other_rows_under_the_same_name_and_damaged_scores_are_measured_anew(tiny, data, tmp_path, caplog):
    cache = tmp_path / "cache"
    run_benchmarks(base_of(tiny), {}, config_of(data), cache=cache)
    for name in NAMES:
        write_rows(tmp_path / "other" / f"{name}.jsonl", tiny_benchmarks.hub_rows(name, ROWS, seed=5))
    assert len(measured(base_of(tiny), {}, config_of(tmp_path / "other"), cache=cache)[1]) == len(NAMES)
    for file in cache.glob("*.json"):
        file.write_text(file.read_text()[:40])
    assert len(measured(base_of(tiny), {}, config_of(data), cache=cache)[1]) == len(NAMES)
    assert "is damaged" in caplog.text


def test_scores_belong_to_the_context_length_the_positions_and_the_versions(tiny, data, tmp_path, monkeypatch):
    """What decides the answers beside the weights is part of what scores are kept by."""
    cache = tmp_path / "cache"
    run_benchmarks(base_of(tiny), {}, config_of(data), cache=cache)
    short, turned = (shutil.copytree(tiny, tmp_path / name) for name in ("short", "turned"))
    edit(short / "config.json", max_position_embeddings=48)
    edit(turned / "tokenizer_config.json", model_max_length=64)
    for folder in (short, turned):
        assert len(measured(base_of(folder), {}, config_of(data), cache=cache)[1]) == len(NAMES), folder
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0" if name == "peft" else version(name))
    report, titles = measured(base_of(tiny), {}, config_of(data), cache=cache)
    assert len(titles) == len(NAMES)
    assert set(report.settings["versions"]) == {"gaintune", "lm_eval", "peft", "torch", "transformers"}


def test_an_adapter_is_refused_also_where_its_scores_are_kept(tiny, data, tmp_path):
    folder, cache = adapter(tiny, tmp_path / "adapter", "gain-ffn"), tmp_path / "cache"
    other = tiny_base.folder(tmp_path / "other", seed=1, dtype=torch.float32, max_position_embeddings=1024)
    asked = {"config": config_of(data), "cache": cache}
    run_benchmarks(base_of(other), {"mine": folder}, allow_other_base=True, **asked)
    refused(BaseMismatchError, "was trained on", run_benchmarks, base_of(other), {"mine": folder}, **asked)
    run_benchmarks(base_of(tiny), {"mine": folder}, **asked)
    weights = folder / "adapter_model.safetensors"
    altered = bytearray(weights.read_bytes())
    altered[-1] ^= 1
    weights.write_bytes(altered)
    refused(AdapterError, "damaged adapter", run_benchmarks, base_of(tiny), {"mine": folder}, **asked)


def test_differences_are_paired_row_by_row(tiny, data, tmp_path):
    config = config_of(data)
    report = run_benchmarks(base_of(tiny), {"mine": adapter(tiny, tmp_path / "adapter", "lora")}, config)
    by_metric = {(each.task, each.metric): each for each in report.comparisons}
    metrics = {"arc_easy": ("acc", "acc_norm"), "lambada_openai": ("perplexity", "acc")}
    assert set(by_metric) == {(task, metric) for task, names in metrics.items() for metric in names}
    accuracy = by_metric["arc_easy", "acc_norm"]
    rows = np.subtract(accuracy.adapted.items, accuracy.base.items)
    assert (accuracy.unit, accuracy.difference.value) == ("points", pytest.approx(100 * rows.mean()))
    assert accuracy.difference.low <= accuracy.difference.value <= accuracy.difference.high
    perplexity = by_metric["lambada_openai", "perplexity"]
    assert perplexity.unit == "%"
    assert perplexity.difference.value == pytest.approx(100 * (perplexity.adapted.value / perplexity.base.value - 1))
    assert perplexity.difference.low < perplexity.difference.value < perplexity.difference.high
    nats = np.asarray(perplexity.base.items)
    assert perplexity.base.value == pytest.approx(np.exp(-nats.mean()))
    assert perplexity.base.stderr == pytest.approx(np.exp(-nats.mean()) * nats.std(ddof=1) / np.sqrt(len(nats)))
    drawn = np.random.default_rng(0).choice(nats, (4000, len(nats))).mean(axis=1)
    assert perplexity.base.stderr == pytest.approx(np.exp(-nats.mean()) * drawn.std(), rel=0.15)
    same = compare_scores(report.base, report.base, "base", config)
    assert {(each.difference.value, each.difference.low, each.difference.high) for each in same} == {(0.0, 0.0, 0.0)}
    assert "items" not in json.dumps(report.to_dict())


def test_rows_answered_alike_make_a_narrow_interval():
    """Two models with the same accuracy: sure where they answer the same rows, unsure where they answer others."""
    answers = tuple(float(row % 2) for row in range(60))
    base = BenchmarkScore("quiz", "acc", 0.5, None, answers, 60, "mean", True, TaskFacts("rows", "test", 0, "1"))
    config = BenchmarkConfig.model_validate({"tasks": "quiz"})
    for items, narrow in (((1.0, *answers[1:]), True), ((1.0, *sorted(answers[1:])), False)):
        adapted = replace(base, items=items, value=float(np.mean(items)))
        (found,) = compare_scores([base], [adapted], "mine", config)
        assert found.difference.value == pytest.approx(100 / 60)
        assert (found.difference.high - found.difference.low < 12) is narrow
        # one number has one interval, whoever asks for it
        assert mean_difference([(base, adapted)], config) == found.difference


def test_answers_that_do_not_flip_are_not_certain():
    """None of 60 rows flips: that rules out a change of six points, not one of three; the base itself is exact."""
    facts = TaskFacts("rows", "test", 0, "1")
    base = BenchmarkScore("quiz", "acc", 0.5, None, tuple(float(row % 2) for row in range(60)), 60, "mean", True, facts)
    config = BenchmarkConfig.model_validate({"tasks": "quiz"})
    (found,) = compare_scores([base], [replace(base)], "mine", config)
    one = found.difference
    assert one.value == 0.0 and -6 < one.low < -3 and one.high == pytest.approx(-one.low)
    four = mean_difference([(base, replace(base, task=str(task))) for task in range(4)], config)
    assert four.high == pytest.approx(one.high / 2)  # other rows: errors add up as squares
    assert mean_difference([(base, base), (base, replace(base))], config).high == pytest.approx(one.high / 2)
    assert mean_difference([(base, base)], config) == Interval(0.0, 0.0, 0.0)


def test_a_loaded_model_against_its_own_base_in_the_mode_it_was_in(tiny, data, tmp_path):
    base = base_of(tiny)
    plain = measure_benchmarks(base.model, base.tokenizer, config_of(data))
    model = load_adapter(base, adapter(tiny, tmp_path / "adapter", "gain-ffn"), trainable=True).train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    report = compare_benchmarks(model, base.tokenizer, config_of(data))
    assert torch.equal(torch.rand(1), expected), "training goes on as if nothing had been measured"
    assert model.training and report.base == plain
    assert any(each.difference.value != 0 for each in report.comparisons)
    refused(ConfigError, "PeftModel", compare_benchmarks, base_of(tiny).model, base.tokenizer, config_of(data))


def test_worked_examples_are_never_the_row_itself(data):
    config = config_of(data, tasks=("arc_easy:3",))
    (asked,) = load_suite(config).tasks
    assert asked.facts.fewshot == 3 and any("never a row's own" in note for note in asked.facts.notes)
    asked.task.set_fewshot_seed(config.seed)
    asked.task.build_all_requests(limit=None)
    for request in asked.task.instances:
        prompt, _ = request.arguments
        *examples, question = prompt.split("\n\n")
        assert len(examples) == 3 and question == f"Question: {request.doc['question']}\nAnswer:"
        assert not any(example.startswith(question) for example in examples)


def test_the_limit_takes_the_first_rows(tiny, data):
    base = base_of(tiny)
    whole = measure_benchmarks(base.model, base.tokenizer, config_of(data))
    part = measure_benchmarks(base.model, base.tokenizer, config_of(data, limit=5))
    for task, metric in (("arc_easy", "acc"), ("lambada_openai", "perplexity")):
        few, all_rows = find_score(part, task, metric), find_score(whole, task, metric)
        assert few.rows == 5 and few.items == pytest.approx(all_rows.items[:5], rel=1e-5)


def test_a_prompt_that_is_too_long_is_reported(data, tmp_path, caplog):
    short = base_of(tiny_base.folder(tmp_path / "short", dtype=torch.float32, max_position_embeddings=48))
    measure_benchmarks(short.model, short.tokenizer, config_of(data, tasks=("arc_easy",)))
    assert "longer than the model's 48 tokens and lost their beginning" in caplog.text


@pytest.mark.parametrize("turned", [False, True])
def test_the_metric_that_counts_does_not_hang_on_the_order_of_filters(turned):
    facts = TaskFacts("rows", "test", 0, "1")

    def scores(task, *metrics):
        listed = [BenchmarkScore(task, metric, 0.5, None, (0.0, 1.0), 2, "mean", True, facts) for metric in metrics]
        return listed[::-1] if turned else listed

    for task, counts, other in (
        ("gsm8k_cot", "exact_match,strict-match", "exact_match,flexible-extract"),
        ("triviaqa", "exact_match,remove_whitespace", "exact_match,as-is"),
        ("nq_open", "exact_match,remove_whitespace", "exact_match,as-is"),
    ):
        assert counting_score(scores(task, other, counts), task).metric == counts
    unknown = scores("riddles", "exact_match,one", "exact_match,two")
    refused(ConfigError, "which of them counts is not known", counting_score, unknown, "riddles")


def test_a_task_named_twice_and_a_wrong_count_are_refused():
    refused(ValueError, "every benchmark once", BenchmarkConfig.model_validate, {"tasks": "arc_easy,arc_easy"})
    refused(ValueError, "NAME:EXAMPLES", BenchmarkConfig.model_validate, {"tasks": "arc_easy:many"})
    config = BenchmarkConfig.model_validate({"tasks": "arc_easy, gsm8k:8"})
    assert [(task.name, task.fewshot) for task in config.tasks] == [("arc_easy", None), ("gsm8k", 8)]


@pytest.mark.parametrize("method", ["gain-ffn", "lora", "disel", "ia3", "pissa", "full"])
def test_the_base_is_the_untouched_one_and_is_left_so(tiny, data, tmp_path, method):
    folder = adapter(tiny, tmp_path / "adapter", method)
    config, base = config_of(data), base_of(tiny)
    before = logits(base.model)
    report = run_benchmarks(base, {"mine": folder}, config)
    assert torch.equal(logits(base.model), before) and not hasattr(base.model, "peft_config")
    plain = base_of(tiny)
    assert report.base == measure_benchmarks(plain.model, plain.tokenizer, config)
    assert report.adapted["mine"] == measure_benchmarks(load_adapter(plain, folder), plain.tokenizer, config)
    assert report.score("lambada_openai", "perplexity") != report.score("lambada_openai", "perplexity", "mine")


def test_switching_an_adapter_off_is_trusted_only_where_it_gives_the_base_back(tiny, tmp_path):
    for method, expected in (("gain-ffn", True), ("pissa", False), ("full", False)):
        with attached(base_of(tiny), adapter(tiny, tmp_path / method, method)) as (_, gives_back):
            assert gives_back is expected, method


def test_weights_trained_whole_are_measured_in_their_own_precision(tiny, data, tmp_path):
    """On a bf16 base they are not rounded to it, and the base beside them is not either."""
    whole, gains = adapter(tiny, tmp_path / "whole", "full"), adapter(tiny, tmp_path / "gains", "gain-ffn")
    model, config, watch = ModelConfig(name=str(tiny), device="cpu", dtype="bf16"), config_of(data), Watch()
    report = benchmark_adapters(model, {"gains": gains, "whole": whole}, config, progress=watch)
    assert watch.titles == [f"{who}: {name}" for who in ("base", "gains", "whole", "base") for name in NAMES]
    numbers = {"base": "bfloat16", "gains": "bfloat16", "whole": "float32-autocast-bfloat16"}
    assert report.settings["numbers"] == numbers and list(report.adapted) == ["gains", "whole"]
    base, mixed = base_of(tiny), {"mixed_precision": torch.bfloat16}
    assert base_of_report(report, "whole") == measure_benchmarks(base.model, base.tokenizer, config, **mixed)
    in_fp32 = find_score(measure_benchmarks(base.model, base.tokenizer, config), "lambada_openai", "perplexity")
    in_both = find_score(base_of_report(report, "whole"), "lambada_openai", "perplexity")
    assert in_both.items != in_fp32.items, "fp32 under autocast is not fp32"
    assert in_both.items == pytest.approx(in_fp32.items, rel=0.05)
    assert report.adapted["whole"] == measure_benchmarks(load_adapter(base, whole), base.tokenizer, config, **mixed)
    rounded = load_base(model)
    assert report.base == base_of_report(report, "gains")
    assert report.base == measure_benchmarks(rounded.model, rounded.tokenizer, config)
    assert report.adapted["whole"] != measure_benchmarks(load_adapter(rounded, whole), rounded.tokenizer, config)
    turned = benchmark_adapters(model, {"whole": whole, "gains": gains}, config)
    assert (list(turned.adapted), turned.settings["numbers"]["base"]) == (["whole", "gains"], numbers["whole"])
    assert turned.adapted == report.adapted


def test_weights_trained_whole_are_reported_as_rounded_where_they_are(tiny, data, tmp_path, caplog):
    whole = adapter(tiny, tmp_path / "whole", "full")
    base = load_base(ModelConfig(name=str(tiny), device="cpu", dtype="bf16"))
    run_benchmarks(base, {"mine": whole}, config_of(data, limit=1))
    assert "mine was trained whole in fp32 and is measured rounded to bfloat16" in caplog.text


def test_an_adapter_that_breaks_while_it_is_put_on_comes_off_again(tiny, tmp_path):
    """As where the memory runs out: at the first forward pass with its layers in."""
    folder, base = adapter(tiny, tmp_path / "adapter", "lora"), base_of(tiny)
    before = logits(base.model)

    def breaks(module, arguments):
        if any(isinstance(each, BaseTunerLayer) for each in module.modules()):
            raise torch.cuda.OutOfMemoryError("no room")

    hook = base.model.model.register_forward_pre_hook(breaks)
    with pytest.raises(torch.cuda.OutOfMemoryError), attached(base, folder):
        pass
    hook.remove()
    assert not any(isinstance(each, BaseTunerLayer) for each in base.model.modules())
    assert not hasattr(base.model, "peft_config") and torch.equal(logits(base.model), before)


def test_a_single_row_that_was_trained_whole_is_given_back(tiny, tmp_path):
    """One row of the embedding, which few tokens show."""
    base = base_of(tiny)
    model = attach(base.model, MethodConfig(name="full"), seed=0)
    with torch.no_grad():
        model.get_input_embeddings().weight[201] += 1.0
    folder, record = tmp_path / "row", AdapterRecord(base.name, base.fingerprint, "full", "full", ("prose",))
    save_adapter(model, folder, record)
    base = base_of(tiny)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    with attached(base, folder) as (model, _):
        assert not torch.equal(model.state_dict()["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_of_a_test"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_base_with_code_of_its_own_is_given_back(tmp_path, monkeypatch):
    """Its weights are read again without the leave to run its code, which was given when it was loaded."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tiny_base.folder(tmp_path / "own", dtype=torch.float32)
    (folder / "own.py").write_text(OWN_CODE)
    named = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(folder / "config.json", model_type="own_of_a_test", architectures=["OwnModel"], auto_map=named)
    own = ModelConfig(name=str(folder), device="cpu", dtype="fp32", trust_remote_code=True)
    base = load_base(own)
    before, start = logits(base.model), {name: value.clone() for name, value in base.model.state_dict().items()}
    model = attach(base.model, MethodConfig(name="full"), seed=0)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    save_adapter(model, tmp_path / "whole", AdapterRecord(base.name, base.fingerprint, "full", "full", ("prose",)))
    base = load_base(own)
    with attached(base, tmp_path / "whole"):
        assert not torch.equal(logits(base.model), before)
    assert torch.equal(logits(base.model), before)
    assert all(torch.equal(value, start[name]) for name, value in base.model.state_dict().items())
