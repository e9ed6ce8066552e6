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
from support import refused, tiny_base, tiny_domains, tiny_encoders
from support.files import edit_json, write_rows


@pytest.fixture
def both(tiny, tmp_path):
    return tiny_domains.plan(tiny, tmp_path, data={"train_tokens": 256})


@pytest.fixture
def plan(both):
    return tiny_domains.of(both, "prose")


def written_by_peft(folder, name, **options):
    """An adapter as PEFT writes it, without a record of ours."""
    config = MethodConfig(name=name, **options)
    attach(tiny_base.model(), config, seed=0, shapes_only=True).save_pretrained(folder)  # no rows to start from
    return folder


def recorded(folder, method):
    """A folder with a record of ours."""
    folder.mkdir(exist_ok=True)
    record = AdapterRecord(base_name="tiny", base_fingerprint="", method=method, label=method, domains=())
    (folder / "gaintune.json").write_text(json.dumps(asdict(record)))
    return folder


def resumed(folder, plan, name, **options):
    """The record of an adapter, and the method that carries it on under a plan."""
    return resumed_method(folder, build_plan({**plan, "methods": [{"name": name, **options}]}))


def test_three_in_a_row_keep_what_the_first_was_made_with(plan, tmp_path):
    made = {"name": "disel", "rank": 4, "gate_bias": -2.0, "gate_lr_ratio": 3.0}
    again = {"name": "disel", "rank": 4, "gate_lr_ratio": 2.0}
    start = None
    for number, (method, ratio) in enumerate(((made, 3.0), ("disel", 3.0), (again, 2.0), ("disel", 2.0))):
        adapt({**plan, "methods": [method]}, tmp_path / str(number), start=start)
        start = tmp_path / str(number)
        record = read_json(start / "gaintune.json")["settings"]["method"]
        assert (record["rank"], record["gate_bias"], record["gate_lr_ratio"]) == (4, -2.0, ratio), number
        assert read_json(start / "adapter_config.json")["gate_lr_ratio"] == ratio, number
    with pytest.raises(ConfigError, match=r"was made with rank 4, and cannot be continued with 8: leave rank out"):
        adapt({**plan, "methods": [{"name": "disel", "rank": 8}]}, tmp_path / "fifth", start=start)
    with pytest.raises(ConfigError, match=r"was made without choosing gate_rank"):
        adapt({**plan, "methods": [{"name": "disel", "gate_rank": 2}]}, tmp_path / "fifth", start=start)


def test_classifiers_in_a_row_keep_it_too(tmp_path):
    rows = write_rows(tmp_path / "rule.jsonl", tiny_encoders.rule_rows(30))
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


@pytest.mark.parametrize(
    ("train", "method", "taken"),
    [({}, {}, METHODS["lora"].lr), ({"lr": 0.003}, {}, 0.003), ({"lr": 0.003}, {"lr": 0.02}, 0.02)],
    ids=["default", "plan", "method"],
)
def test_an_adapter_records_its_rate_and_a_new_plan_brings_its_own_rate_and_penalty(
    plan, tmp_path, train, method, taken
):
    methods = [{"name": "lora", "penalty": "l2", **method}]
    adapt({**plan, "train": {**plan["train"], **train}, "methods": methods}, tmp_path / "adapter")
    assert read_record(tmp_path / "adapter").settings["train"]["lr"] == taken
    _, resumed_as = resumed(tmp_path / "adapter", plan, "lora")
    assert (resumed_as.lr, resumed_as.penalty) == (None, None)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_the_catalogue_knows_its_adapters_by_their_configuration(name, plan, tmp_path):
    folder = written_by_peft(tmp_path / "foreign", name)
    kind = METHODS[name].kind if METHODS[name].start is None else "LORA"  # once started, an adapter is plain LoRA
    assert kind_of(json.loads((folder / "adapter_config.json").read_text())) == kind
    for other in METHODS.values():
        if other.kind == kind:
            assert resumed(folder, plan, other.name)[1].name == other.name
        else:
            refused(ConfigError, "choose its own method with --method", resumed, folder, plan, other.name)


def test_every_variant_of_lora_that_peft_knows_is_another_kind():
    variants = [entry.name for entry in fields(LoraConfig) if entry.metadata.get("is_lora_variant")]
    assert len(variants) > 3
    for name in variants:
        assert kind_of({"peft_type": "LORA", name: True}) == f"LORA {name}"
    assert recognize({"peft_type": "LORA", variants[-1]: True}) is None


@pytest.mark.parametrize(("name", "first", "gates", "factors", "line"), [
    ("gain-ffn", "gain", False, True, "gains"),
    ("gated-lora", "gated-lora", True, False, "gated"),
    ("ia3", "ia3", False, True, "weights"),
    ("lora+", "lora", False, False, "scale"),
    ("dora", "dora", False, False, "weights"),
])  # fmt: skip
def test_what_an_adapter_can_do_is_known_with_and_without_a_record(tmp_path, name, first, gates, factors, line):
    folder = written_by_peft(tmp_path / "adapter", name)
    foreign, ours = adapter_method(folder), adapter_method(recorded(folder, name))
    assert (foreign.name, ours.name) == (first, name)
    for method in (foreign, ours):
        assert (method.gates, method.factors is not None, method.line) == (gates, factors, line)
        assert not method.trains_base


def test_what_is_not_in_the_catalogue_has_no_method_and_full_weights_need_no_configuration(tmp_path):
    folder = written_by_peft(tmp_path / "adapter", "lora")
    edit_json(folder / "adapter_config.json", use_qalora=True)
    assert adapter_method(folder) is None and adapter_method(recorded(tmp_path / "full", "full")).trains_base


def test_a_value_that_a_plan_has_no_words_for_stays_the_adapter_s_own(plan, tmp_path):
    folder = written_by_peft(tmp_path / "foreign", "osf")
    assert resumed(folder, plan, "osf")[1].preserved == 0.5
    edit_json(folder / "adapter_config.json", effective_rank=4)
    assert resumed(folder, plan, "osf")[1].preserved is None


def test_an_adapter_of_peft_brings_its_options(plan, tmp_path):
    folder = written_by_peft(tmp_path / "foreign", "disel", rank=3, gate_bias=-1, gate_lr_ratio=7)
    record, method = resumed(folder, plan, "disel")
    assert record is None
    assert (method.rank, method.alpha, method.gate_bias, method.gate_lr_ratio) == (3, 6, -1, 7)
    assert len(method.targets) == 14 and "model.layers.1.mlp.down_proj" in method.targets
    with pytest.raises(ConfigError, match=r"was made with targets \(.*\.\.\.\), and cannot be continued"):
        resumed(folder, plan, "disel", targets="q_proj")
    refused(ConfigError, "was made with rank 3", resumed, folder, plan, "disel", rank=4)
    assert resumed(written_by_peft(tmp_path / "adalora", "adalora", rank=2), plan, "adalora")[1].rank == 2


@pytest.mark.parametrize(("made_by", "method", "message"), [
    ("gated-lora", {"name": "disel", "gate_lr_ratio": 2.0},
     "is a DISEL relu adapter, and method 'disel' continues DISEL sigmoid"),
    ("lora", {"name": "dora"}, "is a LORA adapter, and method 'dora' continues LORA use_dora"),
])  # fmt: skip
def test_an_adapter_of_another_kind_is_not_carried_on(plan, tmp_path, made_by, method, message):
    start = written_by_peft(tmp_path / "start", made_by)
    refused(ConfigError, message, adapt, {**plan, "methods": [method]}, tmp_path / "out", start=start)


def test_another_text_under_the_name_of_a_replayed_domain_is_reported(plan, both, tmp_path, caplog):
    adapt({**plan, "methods": ["lora"]}, tmp_path / "first")
    replay = {**both, "methods": [{"name": "lora", "replay": 0.5}]}
    adapt(replay, tmp_path / "same", start=tmp_path / "first")
    assert "replay" not in caplog.text
    tiny_domains.edit(tmp_path / "prose.jsonl")
    adapt(replay, tmp_path / "other", start=tmp_path / "first")
    assert f"replay: prose is not the text that {tmp_path / 'first'} was trained on: another text" in caplog.text
