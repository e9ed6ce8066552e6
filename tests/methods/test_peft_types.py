"""Any type of PEFT's: trains or is refused in a sentence, ends with the same bytes after a kill, and is configured."""

import logging
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft import RandLoraConfig, get_peft_model

from gaintune.adapters import adapter_method, load_adapter, read_record
from gaintune.analysis.landscape.directions import directions, way_of
from gaintune.cli.options import parse_method
from gaintune.config import MethodConfig, ModelConfig, TrainConfig, build_plan, plan_yaml, read_plan
from gaintune.errors import AdapterError, ConfigError
from gaintune.methods import METHODS, Method, attach, check_method, prepare_method
from gaintune.workflows import adapt, run_sequence
from support import peft_types, refused, tiny_base, tiny_domains
from support.files import contents
from support.killing import killed
from support.tiny_adapters import base_of

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "peft.md"


def method(text: str) -> MethodConfig:
    return MethodConfig.model_validate(parse_method(text))


@pytest.mark.parametrize(("text", "message"), [
    ("lora:use_rslora=maybe", "use_rslora is true or false, got 'maybe'"),
    ("lora:lora_dropout=much", "lora_dropout is a number, got 'much'"),
    ("peft:RANDLORA:r=eight", "r is a whole number, got 'eight'"),
])  # fmt: skip
def test_a_value_of_another_type_is_refused(text, message):
    refused(ConfigError, message, check_method, method(text))


@pytest.mark.filterwarnings(  # what PEFT's own types say of this base and this machine, and torch of FROD's products
    "ignore:Detected that the base layer has no bias term:UserWarning",
    "ignore:Failed to load the CUDA extension:UserWarning",
    "ignore:Setting boft_n_butterfly_factor to 1:UserWarning",
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning",
    "ignore:Unsupported layer type:UserWarning",
)
@pytest.mark.parametrize("kind", peft_types.TYPES)
def test_a_type_trains_or_is_refused_in_one_sentence(tiny, tmp_path, caplog, kind):
    with caplog.at_level(logging.WARNING):
        outcome = peft_types.measure(kind, tiny, tmp_path)
    if outcome.refusal:
        assert kind.lower() in outcome.refusal.lower() and "\n" not in outcome.refusal
    else:
        assert len(outcome.losses) == 2 and all(map(math.isfinite, outcome.losses))
        assert outcome.moved and outcome.loaded and len(set(outcome.parameters)) == 1
        assert ("does not start at the base" in caplog.text) != outcome.starts
    page = PAGE.read_text(encoding="utf-8")
    if f"PEFT {peft.__version__} " in page:
        assert outcome.row in page.splitlines(), "run `make docs`"


def test_the_page_lists_every_type_and_no_other():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    if f"PEFT {peft.__version__} " in PAGE.read_text(encoding="utf-8"):
        assert [row.split("`")[1] for row in rows] == peft_types.TYPES


@pytest.mark.parametrize("text", ["peft:RANDLORA:r=4", "peft:WAVEFT:n_frequency=16"])
def test_killed_in_training_a_type_ends_with_the_same_bytes(tiny, tmp_path, text):
    plan = tiny_domains.of(tiny_domains.plan(tiny, tmp_path), "prose", methods=[parse_method(text)])
    label = method(text).label
    adapt(plan, tmp_path / "whole")
    killed(adapt, (plan, tmp_path / "killed"), f"{label}: learning prose", 5)
    assert list(tmp_path.glob("killed.unfinished/checkpoints/checkpoint-*")) and not (tmp_path / "killed").exists()
    adapt(plan, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_the_fields_reach_peft_as_they_are_given():
    torch.manual_seed(0)
    ours = attach(tiny_base.model(), method("peft:RANDLORA:r=3,randlora_alpha=7"), seed=0)
    theirs = get_peft_model(tiny_base.model(), RandLoraConfig(r=3, randlora_alpha=7, task_type="CAUSAL_LM"))
    assert ours.peft_config["default"].to_dict() == theirs.peft_config["default"].to_dict()
    config = attach(tiny_base.model(), method("lora:use_rslora=true,lora_dropout=1e-1,rank=4"), seed=0).peft_config
    assert (config["default"].use_rslora, config["default"].lora_dropout, config["default"].r) == (True, 0.1, 4)
    assert config["default"].target_modules == {"o_proj"}  # the rest is the preset's


def test_a_type_has_the_abilities_of_the_catalogue_s_entry_for_it():
    for text, name in {
        "peft:GAIN:ffn=true": "gain", "peft:DISEL:r=4": "disel", "peft:ADALORA:target_r=4": "adalora",
        "peft:LORA:use_dora=true": "dora", "lora:use_dora=true": "dora", "peft:LORA:init_lora_weights=pissa": "pissa",
        "lora:init_lora_weights=pissa": "pissa", "peft:OSF": "osf", "peft:VERA": "vera",
    }.items():  # fmt: skip
        found, entry = check_method(method(text)), METHODS[name]
        assert found.kind == entry.kind, text
        for ability in {field.name for field in fields(Method)} - {"name", "lr", "options", "settings", "rates"}:
            assert getattr(found, ability) == getattr(entry, ability), (text, ability)
    lora_plus = check_method(method("lora+:use_dora=true"))
    assert lora_plus.rates(method("lora+:use_dora=true")) == {"lora_B": 16.0} and lora_plus.line == "weights"
    assert {check_method(method(f"peft:{kind}")).lr for kind in ("RANDLORA", "HRA", "LN_TUNING")} == {0.002}


def test_a_plan_without_fields_is_written_as_before_and_one_with_them_reads_back(tmp_path):
    plain = build_plan({"methods": ["lora"]})
    assert "config" not in plan_yaml(plain)
    given = {"name": "peft", "config": {"peft_type": "RANDLORA", "r": 8, "target_modules": ["q_proj"]}}
    plan = build_plan({"methods": [given, {"name": "lora", "config": {"use_rslora": True}}]})
    assert [each.label for each in plan.methods] == ["randlora", "lora"]
    file = tmp_path / "plan.yaml"
    file.write_text(plan_yaml(plan), encoding="utf-8")
    assert read_plan(file) == plan


def test_a_sequence_and_a_start_keep_the_type_and_its_fields(tiny, tmp_path):
    plan = tiny_domains.plan(tiny, tmp_path, methods=[parse_method("peft:HRA:r=4"), "lora"])
    matrix = run_sequence(plan, tmp_path / "run")
    assert [each.label for each in matrix.methods] == ["hra", "lora"]
    last = next((tmp_path / "run" / "stages" / "hra").glob("01-*")) / "adapter"
    record = read_record(last)
    assert record.settings["method"]["config"] == {"peft_type": "HRA", "r": 4} and adapter_method(last) is None
    code = tiny_domains.of(plan, "code", methods=[parse_method("peft:HRA")])
    adapt(code, tmp_path / "more", start=last)
    assert read_record(tmp_path / "more").settings["method"]["config"] == {"peft_type": "HRA", "r": 4}
    for text, message in (("peft:HRA:r=8", "made with r 4"), ("peft:BOFT", "made with peft_type 'HRA'")):
        other = {**code, "methods": [parse_method(text)]}
        refused(ConfigError, message, adapt, other, tmp_path / "other", start=last)


def test_an_adapter_that_peft_wrote_is_continued_with_its_own_fields(tiny, tmp_path):
    plan = tiny_domains.of(tiny_domains.plan(tiny, tmp_path), "prose", methods=[parse_method("peft:HRA:r=4")])
    model = get_peft_model(tiny_base.model(), peft.HRAConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "theirs")
    adapt(plan, tmp_path / "out", start=tmp_path / "theirs")
    assert peft.HRAConfig.from_pretrained(tmp_path / "out").target_modules == {"q_proj"}
    refused(
        ConfigError, "made with r 4", adapt, {**plan, "methods": [parse_method("peft:HRA:r=2")]}, tmp_path / "other",
        start=tmp_path / "theirs",
    )  # fmt: skip


def test_an_adapter_moves_along_the_line_of_its_merged_weights(tiny, tmp_path):
    for kind in ("HRA", "LILY"):
        peft_types.measure(kind, tiny, tmp_path / kind)
    adapter, unmergeable = (tmp_path / kind / "adapter" for kind in ("HRA", "LILY"))
    assert way_of([adapter]) == "weights"
    expected = peft_types.logits(load_adapter(base_of(tiny, "fp32"), adapter))
    with directions(base_of(tiny, "fp32"), [adapter]) as line:
        line.move([1.0])
        torch.testing.assert_close(peft_types.logits(line.model), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="cannot be merged"), directions(base_of(tiny, "fp32"), [unmergeable]):
        pass


def test_kappa_s_targets_are_the_modules_of_the_lowest_condition_numbers():
    model = tiny_base.model()
    names = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    numbers = {name: float(np.linalg.cond(each.weight.detach().double().numpy())) for name, each in names.items()}
    lowest = sorted(numbers, key=numbers.__getitem__)[: len(names) // 5]
    found = attach(model, method("lora:targets=kappa"), seed=0).peft_config["default"].target_modules
    assert found == {*lowest} - {"lm_head"}


@pytest.mark.parametrize(("text", "message"), [
    ("peft:RANLORA:r=8", r"no type 'RANLORA'; did you mean .*RANDLORA.*This PEFT has .*GAIN.*XLORA"),
    ("peft", "no type ''; write peft:TYPE"),
    ("randlora", "did you mean 'peft:RANDLORA'"),
    ("peft:RANDLORA:rr=8", r"'randlora' has no option 'rr'; .*has the fields .*randlora_alpha"),
    ("peft:RANDLORA:randlora_alfa=8", "did you mean 'randlora_alpha'"),
    ("lora:rnk=8", "did you mean 'rank'"),
    ("lora:penalti=l2", "did you mean 'penalty'"),
    ("lora:r=8", "r is what its option 'rank' sets: give rank alone"),
    ("peft:RANDLORA:r=8,rank=4", "r is what its option 'rank' sets"),
    ("lora:task_type=CAUSAL_LM", "task_type is decided by gaintune"),
    ("full:r=8", "method 'full' has no option 'r'"),
    ("gain:orthogonality=1", "has no option 'orthogonality'"),
    ("peft:POLY", "POLY wants the number of a task"),
    ("peft:XLORA", "XLORA mixes the adapters in other folders"),
    *((f"peft:{kind}", f"{kind} trains virtual tokens") for kind in ("PROMPT_TUNING", "P_TUNING", "CPT", "CARTRIDGE")),
])  # fmt: skip
def test_a_mistake_is_one_message_before_anything_is_loaded(text, message):
    with pytest.raises(ConfigError, match=message) as raised:
        prepare_method(method(text), ModelConfig(device="cpu"), TrainConfig())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("text", "message"), [
    ("peft:C3A:block_size=7", "'c3a' cannot be attached to this base: .*block size should be a factor"),
    ("peft:RANDLORA:target_modules=typo", "'randlora' cannot be attached to this base: .*target_modules"),
    ("lora:init_lora_weights=typo", "'lora' cannot be attached to this base: .*init_lora_weights"),
])  # fmt: skip
def test_what_the_base_shows_to_be_wrong_is_one_message(text, message):
    with pytest.raises(ConfigError, match=message) as raised:
        attach(tiny_base.model(), method(text), seed=0)
    assert "\n" not in str(raised.value)


def test_a_start_elsewhere_is_measured_in_every_precision(caplog):
    for dtype in (torch.float32, torch.bfloat16):
        attach(tiny_base.model().to(dtype), method("peft:LORA:r=4"), seed=0)
        attach(tiny_base.model().to(dtype), method("lora:init_lora_weights=pissa"), seed=0)
        assert not caplog.text
        attach(tiny_base.model().to(dtype), method("peft:LORA:r=4,init_lora_weights=false"), seed=0)
        assert "method 'lora' does not start at the base" in caplog.text
        caplog.clear()
