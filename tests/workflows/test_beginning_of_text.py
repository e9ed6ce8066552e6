"""Which models begin their texts, whatever their tokenizers do; and what runs over such a model measure and record."""

import json

import pytest
import torch
import yaml
from torch.nn import functional as F

from gaintune.adapters import read_record
from gaintune.config import build_plan, plan_yaml, plan_yaml_documented
from gaintune.data import ChoiceRow, beginning_of_text, load_domain
from gaintune.evaluate import measure
from gaintune.evaluate.choices import choice_likelihoods
from gaintune.models import begin_texts, load_base, load_tokenizer
from gaintune.workflows import adapt, run_sequence
from support import tiny_base, tiny_domains, tiny_gemma
from support.files import contents, edit_json
from support.tiny_adapters import config_of


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return tiny_gemma.folder(tmp_path_factory.mktemp("gemma"))


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "recurrent_gemma", "vaultgemma"])
def test_gemma_begins_its_texts_whatever_its_tokenizer_says(gemma, family):
    tokenizer = tiny_gemma.tokenizer()
    assert beginning_of_text(tokenizer) == []
    begin_texts(tokenizer, family)
    for begun in (tokenizer, load_tokenizer(config_of(gemma))):
        assert begun("a")["input_ids"][0] == tiny_gemma.BEGIN and beginning_of_text(begun) == [tiny_gemma.BEGIN]


def test_the_settings_of_a_tokenizer_decide_for_other_models(tiny, tmp_path):
    """As a converted .gguf file has them; transformers does not read the key beside a tokenizer.json."""
    ours, plain = load_tokenizer(config_of(tiny)), tiny_base.tokenizer()
    assert ours.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()
    folder = tiny_base.folder(tmp_path / "base")
    for setting, begin in ((False, []), (True, [0])):
        edit_json(folder / "tokenizer_config.json", add_bos_token=setting)
        assert beginning_of_text(load_tokenizer(config_of(folder))) == begin


def test_the_loss_of_a_gemma_is_that_of_its_text_after_the_beginning(gemma, tmp_path):
    base = load_base(config_of(gemma, "fp32"))
    plan = build_plan(tiny_domains.plan(gemma, tmp_path))
    blocks = load_domain(plan.data.domains[0], plan.data, base.tokenizer)
    ours = measure(base.model, blocks.validation, blocks.validation_bytes)
    never = plan.data.model_copy(update={"beginning_of_text": "never"})
    running = load_domain(plan.data.domains[0], never, base.tokenizer).validation.input_ids.flatten().tolist()
    room = plan.data.block_size - 1
    for number, nats in enumerate(ours.nll):
        text = running[number * room : (number + 1) * room]
        with torch.no_grad():
            logits = base.model(torch.tensor([[tiny_gemma.BEGIN, *text[:-1]]])).logits[0].double()
        assert nats == pytest.approx(F.cross_entropy(logits, torch.tensor(text), reduction="sum").item(), rel=1e-5)
    assert ours.tokens == (room,) * len(blocks.validation)


def test_a_sequence_and_an_adapter_record_it(gemma, tmp_path):
    plan = tiny_domains.plan(gemma, tmp_path)
    run_sequence(plan, tmp_path / "run")
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert {each["beginning_of_text"] for each in inputs["domains"].values()} == {tiny_gemma.BEGIN}
    assert "beginning_of_text" not in (tmp_path / "run" / "plan.yaml").read_text()
    record = read_record(tmp_path / "run" / "stages" / "gain-ffn" / "02-code" / "adapter")
    assert record.settings["data"] == {"beginning_of_text": tiny_gemma.BEGIN}
    one = tiny_domains.of(plan, "prose")
    adapt(one, tmp_path / "adapter")
    assert read_record(tmp_path / "adapter").settings["data"] == {"beginning_of_text": tiny_gemma.BEGIN}
    adapt({**one, "data": {**one["data"], "beginning_of_text": "never"}}, tmp_path / "never")
    never = read_record(tmp_path / "never")
    assert "data" not in never.settings and never.data["prose"].beginning_of_text == "never"


def test_nothing_is_recorded_of_a_model_without_one(tiny, tmp_path):
    plan = tiny_domains.of(tiny_domains.plan(tiny, tmp_path), "prose")
    run_sequence(plan, tmp_path / "run")
    adapt(plan, tmp_path / "adapter")
    files = contents(tmp_path / "run") | contents(tmp_path / "adapter")
    assert not [name for name, content in files.items() if b"beginning_of_text" in content]


def test_a_plan_names_it_where_it_is_chosen_and_every_key_is_explained():
    assert "beginning_of_text" not in yaml.safe_load(plan_yaml(build_plan({})))["data"]
    chosen = build_plan({"data": {"beginning_of_text": "never"}})
    assert build_plan(yaml.safe_load(plan_yaml(chosen))) == chosen
    for plan, value in ((build_plan({}), "auto"), (chosen, "never")):
        assert yaml.safe_load(plan_yaml_documented(plan))["data"]["beginning_of_text"] == value


def test_questions_begin_with_it_as_the_plan_says(gemma):
    base = load_base(config_of(gemma, "fp32"))
    rows = [ChoiceRow("fine\nMood:", (" good", " bad"), 0, "a:1")]
    begun = [ChoiceRow("<bos>fine\nMood:", (" good", " bad"), 0, "a:1")]
    auto, always, never = (
        choice_likelihoods(base.model, base.tokenizer, rows, "moods", beginning=choice).sums
        for choice in ("auto", "always", "never")
    )
    assert auto == always == choice_likelihoods(base.model, base.tokenizer, begun, "moods", beginning="never").sums
    assert never == choice_likelihoods(base.model, tiny_gemma.tokenizer(), rows, "moods").sums != auto
