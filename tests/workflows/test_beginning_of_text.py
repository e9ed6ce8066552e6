"""Which models begin their texts, whatever their tokenizers do; and what runs over such a model measure and record."""

import json

import pytest
import torch
import yaml
from torch.nn import functional as F

from gaintune.adapters import read_record
from gaintune.config import ModelConfig, build_plan, plan_yaml, plan_yaml_documented
from gaintune.data import ChoiceRow, beginning_of_text, load_domain
from gaintune.evaluate import measure
from gaintune.evaluate.choices import choice_likelihoods
from gaintune.models import begin_texts, load_base, load_tokenizer
from gaintune.workflows import adapt, run_sequence
from support import tiny_base, tiny_domains, tiny_gemma


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return tiny_gemma.folder(tmp_path_factory.mktemp("gemma"))


def model_config(folder):
    return ModelConfig(name=str(folder), dtype="fp32", device="cpu")


def edit(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_gemma_begins_its_texts_whatever_its_tokenizer_says(gemma):
    assert beginning_of_text(tiny_gemma.tokenizer()) == []
    tokenizer = load_tokenizer(model_config(gemma))
    assert tokenizer("a")["input_ids"][0] == tiny_gemma.BEGIN
    assert beginning_of_text(tokenizer) == [tiny_gemma.BEGIN]


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "recurrent_gemma", "vaultgemma"])
def test_so_does_every_generation(family):
    tokenizer = tiny_gemma.tokenizer()
    begin_texts(tokenizer, family)
    assert beginning_of_text(tokenizer) == [tiny_gemma.BEGIN]


def test_settings_that_ask_for_it_are_heard(tmp_path):
    """As a converted .gguf file has them; transformers does not read the key beside a tokenizer.json."""
    folder = tiny_base.folder(tmp_path / "base")
    for said, begin in ((False, []), (True, [0])):
        edit(folder, "tokenizer_config.json", add_bos_token=said)
        assert beginning_of_text(load_tokenizer(model_config(folder))) == begin


def test_others_tokenise_as_they_did(tmp_path):
    folder = tiny_base.folder(tmp_path / "base")
    ours, plain = load_tokenizer(model_config(folder)), tiny_base.tokenizer()
    assert ours.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()


def test_the_loss_of_a_gemma_is_that_of_its_text_after_the_beginning(gemma, tmp_path):
    base = load_base(model_config(gemma))
    plan = build_plan(tiny_domains.plan(gemma, tmp_path))
    blocks = load_domain(plan.data.domains[0], plan.data, base.tokenizer)
    ours = measure(base.model, blocks.validation, blocks.validation_bytes)
    without = load_domain(
        plan.data.domains[0], plan.data.model_copy(update={"beginning_of_text": "never"}), base.tokenizer
    )
    running = without.validation.input_ids.flatten().tolist()
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
    one = {**plan["data"], "domains": plan["data"]["domains"][:1]}
    adapt({**plan, "data": one}, tmp_path / "adapter")
    assert read_record(tmp_path / "adapter").settings["data"] == {"beginning_of_text": tiny_gemma.BEGIN}
    adapt({**plan, "data": {**one, "beginning_of_text": "never"}}, tmp_path / "never")
    never = read_record(tmp_path / "never")
    assert "data" not in never.settings
    assert never.data["prose"].beginning_of_text == "never"


def test_nothing_is_recorded_of_a_model_without_one(tmp_path):
    plan = tiny_domains.plan(tiny_base.folder(tmp_path / "base"), tmp_path)
    plan["data"]["domains"] = plan["data"]["domains"][:1]
    run_sequence(plan, tmp_path / "run")
    adapt(plan, tmp_path / "adapter")
    for file in (
        *(tmp_path / "run").rglob("*.json"),
        tmp_path / "run" / "plan.yaml",
        *(tmp_path / "adapter").iterdir(),
    ):
        assert b"beginning_of_text" not in file.read_bytes(), file


def test_a_plan_names_it_where_it_is_chosen_and_every_key_is_explained():
    assert "beginning_of_text" not in yaml.safe_load(plan_yaml(build_plan({})))["data"]
    chosen = build_plan({"data": {"beginning_of_text": "never"}})
    assert build_plan(yaml.safe_load(plan_yaml(chosen))) == chosen
    for plan, value in ((build_plan({}), "auto"), (chosen, "never")):
        assert yaml.safe_load(plan_yaml_documented(plan))["data"]["beginning_of_text"] == value


def test_questions_begin_with_it_as_the_plan_says(gemma):
    base = load_base(model_config(gemma))
    rows = [ChoiceRow("fine\nMood:", (" good", " bad"), 0, "a:1")]
    begun = [ChoiceRow("<bos>fine\nMood:", (" good", " bad"), 0, "a:1")]
    auto, always, never = (
        choice_likelihoods(base.model, base.tokenizer, rows, "moods", beginning=choice).sums
        for choice in ("auto", "always", "never")
    )
    assert auto == always == choice_likelihoods(base.model, base.tokenizer, begun, "moods", beginning="never").sums
    assert never == choice_likelihoods(base.model, tiny_gemma.tokenizer(), rows, "moods").sums != auto
