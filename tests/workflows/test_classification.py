"""Classifiers: trained, saved and restored bit for bit on encoders and decoders, continued after a stop, refused."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, GPT2Config, T5Config, T5ForConditionalGeneration
from transformers.models.gpt2 import GPT2LMHeadModel

from gaintune.adapters import load_adapter, read_record
from gaintune.config import EvaluateConfig, ModelConfig, build_plan
from gaintune.data import Padding, labelled, load_classification
from gaintune.errors import BaseMismatchError, BaseModelError, ConfigError, RunDirectoryError
from gaintune.evaluate import compare_classifiers, predict, score
from gaintune.evaluate.classification import row_logits
from gaintune.models import base_fingerprint, load_classifier, load_tokenizer, reads_segments
from gaintune.workflows import ClassifierResult, adapt, adapt_classifier, run_sequence
from support import STUDY_DATA, refused, tiny_base, tiny_encoders, tiny_glue
from support.files import contents, edit_json, write_rows
from support.killing import killed

GLUE = STUDY_DATA / "glue"
LEARN = {"epochs": 4, "batch_size": 16, "lr": 0.01, "checkpoint_steps": 50}


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Path:
    return tiny_encoders.folder(tmp_path_factory.mktemp("roberta"))


@pytest.fixture(scope="module")
def rule(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rule.jsonl", tiny_encoders.rule_rows(240))


def domain_of(values: dict):
    plan = build_plan(values)
    options = {"seed": plan.data.seed, "segments": reads_segments(plan.model)}
    return load_classification(plan.data.domains[0], plan.classify, load_tokenizer(plan.model), **options)


def restored(values: dict, adapter: Path):
    """The domain, and the saved classifier on a fresh base."""
    plan, domain = build_plan(values), domain_of(values)
    base = load_classifier(plan.model, domain.labels, seed=99)  # another random head than in training
    return domain, base, load_adapter(base, adapter)


def logits(model, domain, base) -> torch.Tensor:
    return row_logits(model, domain.validation, Padding(base.padding), batch_size=16)


def scores(values: dict, adapter: Path):
    """What a saved classifier scores on a fresh base."""
    domain, base, loaded = restored(values, adapter)
    return score(predict(loaded, domain, Padding(base.padding), batch_size=16), EvaluateConfig(bootstrap_samples=50))


@pytest.mark.parametrize(("kind", "method"), [
    *(("roberta", method) for method in ("gain-ffn", "ia3", "full", {"name": "disel", "rank": 4})),
    *(("roberta", {"name": name, "rank": 4, "targets": "all-linear"}) for name in ("lora", "adalora")),
    *(("roberta", {"name": name, "rank": 4, "targets": "all-linear"}) for name in ("eva", "lora-ga", "corda")),
    *(("bert", "gain-ffn"), ("deberta-v2", "gain"), ("distilbert", "gain-ffn")),
])  # fmt: skip
def test_a_classifier_learns_a_rule_and_the_saved_one_is_the_trained_one(kind, method, rule, tmp_path):
    model = tiny_encoders.folder(tmp_path / "base", kind)
    lr = 1e-3 if method == "full" else 0.01
    values = tiny_encoders.plan(model, rule, methods=[method], train={**LEARN, "lr": lr})
    result = adapt(values, tmp_path / "out")
    assert isinstance(result, ClassifierResult) and result.labels == ("many-a", "many-o")
    assert result.scores.accuracy.value > 0.9 > result.scores.majority
    assert scores(values, tmp_path / "out") == result.scores
    domain, base, loaded = restored(values, tmp_path / "out")
    if method != "full":  # plain PEFT, on a base whose head is as random
        plain = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
        plain = PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()
        assert torch.equal(logits(plain, domain, base), logits(loaded, domain, base))
    record = read_record(tmp_path / "out")
    assert record.labels == result.labels
    assert record.base_fingerprint == base_fingerprint(ModelConfig(name=str(model)))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_pools_the_last_token_before_the_padding(kind, rule, tmp_path):
    folder = tmp_path / "base"
    if kind == "llama":
        tiny_base.folder(folder, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        sizes = {"vocab_size": tiny_base.VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
        tiny_base.tokenizer().save_pretrained(folder)
    lora = {"name": "lora", "rank": 8, "targets": "all-linear"}
    values = tiny_encoders.plan(folder, rule, methods=[lora], train=LEARN, classify={"head_lr": 0.01})
    assert adapt(values, tmp_path / "out").scores.accuracy.value > 0.9
    domain, base, loaded = restored(values, tmp_path / "out")
    assert len({len(row) for row in domain.validation.input_ids}) > 1
    alone = row_logits(loaded, domain.validation, Padding(base.padding), batch_size=1)
    torch.testing.assert_close(logits(loaded, domain, base), alone, rtol=1e-4, atol=1e-4)
    hidden = loaded.get_base_model().base_model(domain.validation.input_ids[0][None], use_cache=False)[0]
    head = load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.score.weight"]
    torch.testing.assert_close(alone[0], hidden[0, -1] @ head.T, rtol=1e-4, atol=1e-4)


def test_adapter_and_head_alone_train_and_are_all_that_is_saved(roberta, rule, tmp_path):
    values = tiny_encoders.plan(roberta, rule)
    adapt(values, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    kinds = {name.split(".")[-1] if "gain_v" in name else name.split(".classifier.")[1] for name in saved}
    assert kinds == {"gain_v", "dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}
    assert sum("gain_v" in name for name in saved) == 4
    refused(ConfigError, "exists already", adapt, values, tmp_path / "out")


def test_killed_in_training_it_ends_with_the_same_adapter_or_refuses_other_rows(roberta, tmp_path):
    file = write_rows(tmp_path / "rule.jsonl", tiny_encoders.rule_rows(80))
    values = tiny_encoders.plan(roberta, file)
    expected = adapt(values, tmp_path / "whole")
    killed(adapt, (values, tmp_path / "killed"), "gain-ffn: learning rule", 8)
    assert not (tmp_path / "killed").exists()
    write_rows(file, tiny_encoders.rule_rows(80, seed=1))
    refused(RunDirectoryError, r"rule\.content_hash.*delete .*killed\.unfinished", adapt, values, tmp_path / "killed")
    write_rows(file, tiny_encoders.rule_rows(80))
    assert adapt(values, tmp_path / "killed").scores == expected.scores
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not (tmp_path / "killed.unfinished").exists()


def test_the_head_stays_in_fp32_beside_a_base_in_bf16(roberta, rule, tmp_path):
    values = tiny_encoders.plan(roberta, rule, model={"dtype": "bf16"}, train={"lr": 0.01})
    result = adapt(values, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert restored(values, tmp_path / "out")[1].model.dtype == torch.bfloat16
    assert scores(values, tmp_path / "out") == result.scores


def test_the_head_learns_at_its_own_rate(roberta, rule, tmp_path, monkeypatch):
    values = tiny_encoders.plan(roberta, rule, train={"lr": 0.01}, classify={"head_lr": 1e-12})
    adapt(values, tmp_path / "out")
    base = load_classifier(build_plan(values).model, ("many-a", "many-o"), seed=0)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    start = base.model.classifier.dense.weight
    torch.testing.assert_close(saved["base_model.model.classifier.dense.weight"], start, rtol=0, atol=1e-8)
    assert max(tensor.abs().max() for name, tensor in saved.items() if "gain_v" in name) > 0.01
    assert read_record(tmp_path / "out").settings["classify"]["head_lr"] == 1e-12


def test_carrying_on_starts_where_the_classifier_stopped_and_wants_the_same_labels(roberta, rule, tmp_path):
    values = tiny_encoders.plan(roberta, rule, train=LEARN)
    first = adapt(values, tmp_path / "first")
    still = {**values, "train": {**LEARN, "lr": 1e-9, "epochs": 1}}
    assert adapt(still, tmp_path / "second", start=tmp_path / "first").scores == first.scores
    assert read_record(tmp_path / "second").domains == ("rule", "rule")
    others = [{"text": f"{'ab'[number % 2]} {number}", "label": "xy"[number % 2]} for number in range(40)]
    renamed = write_rows(tmp_path / "others.jsonl", others)
    with pytest.raises(ConfigError, match=r"has the labels many-a, many-o, domain 'others' has the labels x, y"):
        adapt(tiny_encoders.plan(roberta, renamed), tmp_path / "third", start=tmp_path / "first")
    other = tiny_encoders.folder(tmp_path / "other", seed=5)
    with pytest.raises(BaseMismatchError):
        adapt(tiny_encoders.plan(other, rule), tmp_path / "third", start=tmp_path / "first")


def test_what_cannot_be_a_classifier_is_refused(roberta, rule, tmp_path):
    with pytest.raises(ConfigError, match=r"a sequence measures perplexity.*--masked"):
        run_sequence(tiny_encoders.plan(roberta, rule), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"data\.task=classify"):
        adapt_classifier({**tiny_encoders.plan(roberta, rule), "data": {"domains": [str(rule)]}}, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"max_length is 600, but model .* takes 512 tokens at most"):
        adapt(tiny_encoders.plan(roberta, rule, classify={"max_length": 600}), tmp_path / "out")
    t5 = T5Config(vocab_size=300, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    tiny_encoders.tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(BaseModelError, match=r"is a T5ForConditionalGeneration; a classifier needs an encoder"):
        adapt(tiny_encoders.plan(tmp_path / "t5", rule), tmp_path / "out2")


def test_a_base_that_lacks_more_than_its_head_is_refused(rule, tmp_path):
    folder = tiny_encoders.folder(tmp_path / "base")
    edit_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(BaseModelError, match=r"16 weights besides the new head's are missing.*layer\.2"):
        adapt(tiny_encoders.plan(folder, rule), tmp_path / "out")


@pytest.mark.parametrize("task", tiny_glue.SCHEMAS)
def test_a_task_of_glue_by_name_end_to_end(task, roberta, tmp_path, monkeypatch):
    """By name from rows in the Hub's schema; the classifier then measures a local copy of the same task."""
    monkeypatch.setitem(labelled.GLUE, task, tiny_glue.write(tmp_path, task))
    limits = {"max_length": 96, "train_rows": 16, "validation_rows": 8}
    values = tiny_encoders.plan(roberta, Path(task), classify=limits)
    assert values["data"]["domains"] == [f"{task}={task}"]
    check_glue(values, task, tmp_path / "out", 16, 8)
    copy = build_plan({**values, "data": {"task": "classify", "domains": [str(tmp_path / task)]}})
    (figure,) = compare_classifiers(copy, [tmp_path / "out"])
    assert (figure.scores.domain, figure.scores.rows) == (task, 8)


@pytest.mark.study_data
@pytest.mark.skipif(not GLUE.is_dir(), reason=f"the GLUE rows are not in {GLUE}")
@pytest.mark.parametrize("task", tiny_glue.SCHEMAS)
def test_the_study_rows_of_glue_end_to_end(task, roberta, tmp_path):
    limits = {"max_length": 96, "train_rows": 48, "validation_rows": 32}
    check_glue(tiny_encoders.plan(roberta, GLUE / task, classify=limits), task, tmp_path / "out", 48, 32)


def check_glue(values: dict, task: str, out: Path, train: int, validation: int) -> None:
    """Train on a task, restore the classifier, and compare its scores."""
    result, schema = adapt(values, out), tiny_glue.SCHEMAS[task]
    assert result.labels == tuple(sorted(schema.labels))
    assert (result.scores.rows, result.scores.domain) == (validation, task)
    assert (result.scores.f1 is not None) == (task == "mrpc")
    assert sum(each.rows for each in result.scores.classes) == validation
    assert scores(values, out) == result.scores
    domain, base, _ = restored(values, out)
    separators = sum((row == base.tokenizer.sep_token_id).sum().item() for row in domain.train.input_ids)
    assert separators == train * (3 if schema.columns[1:] else 1)  # RoBERTa puts two between the texts of a pair
