"""Carrying an adapter on: what it was made with stays and is recorded, and what cannot be continued is refused."""

import json
from dataclasses import asdict, fields

import pytest
from peft import LoraConfig

from gaintune.adapters import AdapterRecord, adapter_method, read_record
from gaintune.config import MethodConfig, build_plan
from gaintune.errors import ConfigError
from gaintune.methods import METHODS, attach, kind_of, recognize
from gaintune.storage import read_json
from gaintune.workflows import adapt
from gaintune.workflows.adaptation import resumed_method
from support import tiny_base, tiny_domains, tiny_encoders


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base.folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def plan(base, tmp_path):
    plan = tiny_domains.plan(base, tmp_path, data={"train_tokens": 256})
    plan["data"]["domains"] = plan["data"]["domains"][:1]
    return plan


def written_by_peft(folder, method):
    """An adapter as PEFT writes it, without a record of ours."""
    attach(tiny_base.model(), MethodConfig.model_validate(method), seed=0).save_pretrained(folder)
    return folder


def test_three_in_a_row_keep_what_the_first_was_made_with(plan, tmp_path):
    made = {"name": "disel", "rank": 4, "gate_bias": -2.0, "gate_lr_ratio": 3.0}
    again = {"name": "disel", "rank": 4, "gate_lr_ratio": 2.0}
    start = None
    for folder, method in (("first", made), ("second", "disel"), ("third", again), ("fourth", "disel")):
        adapt({**plan, "methods": [method]}, tmp_path / folder, start=start)
        start = tmp_path / folder
        record = read_json(start / "gaintune.json")["settings"]["method"]
        ratio = 3.0 if folder in ("first", "second") else 2.0
        assert (record["rank"], record["gate_bias"], record["gate_lr_ratio"]) == (4, -2.0, ratio), folder
        assert read_json(start / "adapter_config.json")["gate_lr_ratio"] == ratio, folder
    with pytest.raises(ConfigError, match=r"was made with rank 4, and cannot be continued with 8: leave rank out"):
        adapt({**plan, "methods": [{"name": "disel", "rank": 8}]}, tmp_path / "fifth", start=start)
    with pytest.raises(ConfigError, match=r"was made without choosing gate_rank"):
        adapt({**plan, "methods": [{"name": "disel", "gate_rank": 2}]}, tmp_path / "fifth", start=start)


def test_classifiers_in_a_row_keep_it_too(tmp_path):
    rows = tiny_encoders.write_rows(tmp_path / "rule.jsonl", tiny_encoders.rule_rows(30))
    plan = tiny_encoders.plan(tiny_encoders.folder(tmp_path / "base"), rows)
    start = None
    for folder, options in (("first", {"rank": 2, "lr_ratio": 4.0}), ("second", {}), ("third", {"rank": 2})):
        adapt({**plan, "methods": [{"name": "lora+", **options}]}, tmp_path / folder, start=start)
        start = tmp_path / folder
        record = read_json(start / "gaintune.json")["settings"]["method"]
        assert (record["rank"], record["lr_ratio"]) == (2, 4.0), folder


def test_a_rate_that_belongs_to_the_method_is_kept_unless_given_anew(plan, tmp_path):
    def weights(folder, start=None, **options):
        adapt({**plan, "methods": [{"name": "lora+", **options}]}, tmp_path / folder, start=start)
        return (tmp_path / folder / "adapter_model.safetensors").read_bytes()

    weights("first", rank=2, lr_ratio=4.0)
    kept = weights("kept", tmp_path / "first")
    assert kept == weights("same", tmp_path / "first", lr_ratio=4.0)
    assert kept != weights("other", tmp_path / "first", lr_ratio=16.0)


def test_rate_penalty_and_replay_are_those_of_the_new_plan(plan, tmp_path):
    adapt({**plan, "methods": [{"name": "lora", "lr": 0.02, "penalty": "l2"}]}, tmp_path / "first")
    _, method = resumed_method(tmp_path / "first", build_plan({**plan, "methods": ["lora"]}))
    assert (method.lr, method.penalty) == (None, None)


@pytest.mark.parametrize(
    ("train", "method", "taken"),
    [({}, {}, METHODS["lora"].lr), ({"lr": 0.003}, {}, 0.003), ({"lr": 0.003}, {"lr": 0.02}, 0.02)],
    ids=["default", "plan", "method"],
)
def test_an_adapter_records_the_rate_that_was_taken(plan, tmp_path, train, method, taken):
    adapt({**plan, "train": {**plan["train"], **train}, "methods": [{"name": "lora", **method}]}, tmp_path / "adapter")
    assert read_record(tmp_path / "adapter").settings["train"]["lr"] == taken


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_the_catalogue_knows_its_adapters_by_their_configuration(name, plan, tmp_path):
    folder = written_by_peft(tmp_path / "foreign", {"name": name})
    assert kind_of(json.loads((folder / "adapter_config.json").read_text())) == METHODS[name].kind
    for other in METHODS.values():
        values = build_plan({**plan, "methods": [other.name]})
        if other.kind == METHODS[name].kind:
            assert resumed_method(folder, values)[1].name == other.name
        else:
            with pytest.raises(ConfigError, match="choose its own method with --method"):
                resumed_method(folder, values)


def test_every_variant_of_lora_that_peft_knows_is_another_kind():
    variants = [entry.name for entry in fields(LoraConfig) if entry.metadata.get("is_lora_variant")]
    assert len(variants) > 3
    for name in variants:
        assert kind_of({"peft_type": "LORA", name: True}) == f"LORA {name}"
    assert recognize({"peft_type": "LORA", variants[-1]: True}) is None


@pytest.mark.parametrize(
    ("name", "first", "gates", "factors", "line"),
    [
        ("gain-ffn", "gain", False, True, "gains"),
        ("gated-lora", "gated-lora", True, False, "gated"),
        ("ia3", "ia3", False, True, "weights"),
        ("lora+", "lora", False, False, "scale"),
        ("dora", "dora", False, False, "weights"),
    ],
)
def test_what_an_adapter_can_do_is_known_with_and_without_a_record(tmp_path, name, first, gates, factors, line):
    folder = written_by_peft(tmp_path / "adapter", {"name": name})
    foreign = adapter_method(folder)
    record = AdapterRecord(base_name="tiny", base_fingerprint="", method=name, label=name, domains=())
    (folder / "gaintune.json").write_text(json.dumps(asdict(record)))
    ours = adapter_method(folder)
    assert (foreign.name, ours.name) == (first, name)
    for method in (foreign, ours):
        assert (method.gates, method.factors is not None, method.line, method.trains_base) == (
            gates, factors, line, False
        )  # fmt: skip


def test_what_is_not_in_the_catalogue_has_no_method_and_full_weights_need_no_configuration(tmp_path):
    folder = written_by_peft(tmp_path / "adapter", {"name": "lora"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_qalora": True}))
    assert adapter_method(folder) is None
    record = AdapterRecord(base_name="tiny", base_fingerprint="", method="full", label="full", domains=())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "gaintune.json").write_text(json.dumps(asdict(record)))
    assert adapter_method(tmp_path / "full").trains_base


def test_a_value_that_a_plan_has_no_words_for_stays_the_adapter_s_own(plan, tmp_path):
    folder = written_by_peft(tmp_path / "foreign", {"name": "osf"})
    config = json.loads((folder / "adapter_config.json").read_text())
    assert resumed_method(folder, build_plan({**plan, "methods": ["osf"]}))[1].preserved == 0.5
    (folder / "adapter_config.json").write_text(json.dumps({**config, "effective_rank": 4}))
    assert resumed_method(folder, build_plan({**plan, "methods": ["osf"]}))[1].preserved is None


def test_an_adapter_of_peft_brings_its_options(plan, tmp_path):
    folder = written_by_peft(tmp_path / "foreign", {"name": "disel", "rank": 3, "gate_bias": -1, "gate_lr_ratio": 7})
    record, method = resumed_method(folder, build_plan({**plan, "methods": ["disel"]}))
    assert record is None
    assert (method.rank, method.alpha, method.gate_bias, method.gate_lr_ratio) == (3, 6, -1, 7)
    assert len(method.targets) == 14 and "model.layers.1.mlp.down_proj" in method.targets
    with pytest.raises(ConfigError, match=r"was made with targets \(.*\.\.\.\), and cannot be continued"):
        resumed_method(folder, build_plan({**plan, "methods": [{"name": "disel", "targets": "q_proj"}]}))
    with pytest.raises(ConfigError, match="was made with rank 3"):
        resumed_method(folder, build_plan({**plan, "methods": [{"name": "disel", "rank": 4}]}))
    adalora = written_by_peft(tmp_path / "adalora", {"name": "adalora", "rank": 2})
    assert resumed_method(adalora, build_plan({**plan, "methods": ["adalora"]}))[1].rank == 2


def test_a_plan_for_a_gate_rate_needs_gates(plan, tmp_path):
    relu = written_by_peft(tmp_path / "relu", {"name": "gated-lora"})
    gated = {**plan, "methods": [{"name": "disel", "gate_lr_ratio": 2.0}]}
    with pytest.raises(ConfigError, match="is a DISEL relu adapter, and method 'disel' continues DISEL sigmoid"):
        adapt(gated, tmp_path / "out", start=relu)
    dora = {**plan, "methods": ["dora"]}
    with pytest.raises(ConfigError, match="is a LORA adapter, and method 'dora' continues LORA use_dora"):
        adapt(dora, tmp_path / "out", start=written_by_peft(tmp_path / "lora", {"name": "lora"}))


def test_another_text_under_the_name_of_a_replayed_domain_is_said(plan, tmp_path, caplog):
    prose, code = plan["data"]["domains"][0], f"code={tmp_path / 'code.jsonl'}"
    adapt({**plan, "methods": ["lora"]}, tmp_path / "first")

    def replayed(folder, domain):
        data = {**plan["data"], "domains": [domain, code]}
        method = {"name": "lora", "replay": 0.5}
        adapt({**plan, "data": data, "methods": [method]}, tmp_path / folder, start=tmp_path / "first")

    replayed("same", prose)
    assert "replay" not in caplog.text
    other = tmp_path / "other.jsonl"
    texts = [json.loads(line)["text"].upper() for line in (tmp_path / "prose.jsonl").read_text().splitlines()]
    tiny_encoders.write_rows(other, [{"text": text} for text in texts])
    replayed("other", f"prose={other}")
    assert f"replay: prose is not the text that {tmp_path / 'first'} was trained on: another text" in caplog.text
