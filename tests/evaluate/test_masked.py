"""Masked-LM perplexity: the same masked tokens for every model, the original head, and nothing lost on the way."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from gaintune.adapters import AdapterRecord, save_adapter
from gaintune.config import ModelConfig, build_plan
from gaintune.data import load_domain, load_masked_blocks
from gaintune.data.blocks import mask_blocks
from gaintune.errors import BaseMismatchError, BaseModelError, ConfigError
from gaintune.evaluate import attached_to_language_model, compare_adapters, compare_masked, measure
from gaintune.evaluate.perplexity import measure_masked
from gaintune.methods import attach
from gaintune.models import is_masked, load_base, load_classifier, load_masked
from gaintune.workflows import adapt
from support import refused, tiny_base, tiny_domains, tiny_encoders

TOKENIZER = tiny_encoders.tokenizer()


def blocks(count: int = 40, length: int = 30, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, tiny_encoders.VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=list(tiny_encoders.CONFIGS))
def encoder(request, tmp_path_factory):
    return tiny_encoders.folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return tiny_encoders.folder(tmp_path_factory.mktemp("roberta"))


def text_plan(model, folder, **changes):
    return build_plan(tiny_domains.plan(model, folder, methods=["gain-ffn"], **changes))


def classifier_adapter(model, folder, method="gain-ffn", gains: float = 0.0):
    """An adapter with a head that was never trained, its gains set to `1 + gains`."""
    base = load_classifier(ModelConfig(name=str(model), dtype="fp32", device="cpu"), ("no", "yes"), seed=3)
    made = attach(base.model, build_plan({"methods": [method]}).methods[0], seed=0, task_type="SEQ_CLS", head=base.head)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".gain_v." in name:
                parameter.fill_(gains)
    record = AdapterRecord(str(model), base.fingerprint, method, method, ("x",), labels=("no", "yes"))
    save_adapter(made, folder, record)
    return folder


def test_a_seed_decides_which_tokens_are_masked_and_how():
    original = blocks()
    masked = mask_blocks(original, "prose", TOKENIZER, seed=0)
    again = mask_blocks(original, "prose", TOKENIZER, seed=0)
    other_text = mask_blocks(blocks(seed=1), "prose", TOKENIZER, seed=0)
    assert torch.equal(masked.input_ids, again.input_ids)
    assert torch.equal(masked.labels != -100, other_text.labels != -100)  # places do not depend on the tokens
    first = mask_blocks(original[:7], "prose", TOKENIZER, seed=0)
    assert torch.equal((masked.labels != -100)[:7], first.labels != -100)
    assert not torch.equal(masked.labels, mask_blocks(original, "prose", TOKENIZER, seed=1).labels)
    assert not torch.equal(masked.labels, mask_blocks(original, "code", TOKENIZER, seed=0).labels)
    assert masked.scored == (round(0.15 * 30),) * 40
    assert (masked.input_ids[:, 0] == 0).all() and (masked.input_ids[:, -1] == 2).all()
    inner, wanted = masked.input_ids[:, 1:-1], masked.labels[:, 1:-1]
    chosen = wanted != -100
    assert torch.equal(inner[~chosen], original[~chosen]) and torch.equal(wanted[chosen], original[chosen])


def test_of_the_masked_tokens_most_are_hidden_some_replaced_and_some_left():
    masked = mask_blocks(blocks(count=400, length=100), "prose", TOKENIZER)
    inner, wanted = masked.input_ids[:, 1:-1], masked.labels[:, 1:-1]
    seen, true = inner[wanted != -100], wanted[wanted != -100]
    assert len(seen) == 400 * 15 and abs((seen == TOKENIZER.mask_token_id).float().mean() - 0.8) < 0.02
    assert abs((seen == true).float().mean() - 0.1) < 0.015
    assert not set(seen[seen != TOKENIZER.mask_token_id].tolist()) & {0, 1, 2, 3}


def test_special_tokens_inside_a_block_are_never_to_be_predicted():
    original = blocks()
    original[:, ::2] = 2
    masked = mask_blocks(original, "prose", TOKENIZER)
    assert not (masked.labels == 2).any() and masked.scored == (round(0.15 * 15),) * 40


def test_the_loss_is_that_of_the_models_own_logits(encoder):
    base = load_masked(ModelConfig(name=str(encoder), dtype="fp32", device="cpu"))
    masked = mask_blocks(blocks(7), "prose", base.tokenizer)
    measured = measure_masked(base.model, masked, batch_size=3)
    with torch.no_grad():
        logits = base.model(masked.input_ids, attention_mask=torch.ones_like(masked.input_ids)).logits
        losses = F.cross_entropy(logits.transpose(1, 2), masked.labels, ignore_index=-100, reduction="none")
    torch.testing.assert_close(torch.tensor(measured.nll), losses.sum(dim=1), rtol=1e-5, atol=1e-5)
    assert measured.tokens == masked.scored
    assert measured.perplexity == pytest.approx(math.exp(losses.sum().item() / sum(masked.scored)), rel=1e-5)


@pytest.mark.parametrize("gains", [0.0, 0.5])
def test_the_adapted_encoder_meets_the_original_head(encoder, gains, tmp_path):
    """Gains of 1 change nothing at all; others change what the same gains do inside the masked language model."""
    adapter = classifier_adapter(encoder, tmp_path / "adapter", gains=gains)
    settings = ModelConfig(name=str(encoder), dtype="fp32", device="cpu")
    untouched, base = load_masked(settings), load_masked(settings)
    masked = mask_blocks(blocks(6), "prose", base.tokenizer)
    before = measure_masked(untouched.model, masked)
    with attached_to_language_model(base, adapter, build_plan({"model": settings.model_dump()})) as model:
        after = measure_masked(model, masked)
    assert measure_masked(base.model, masked) == before and (after == before) == (gains == 0)
    by_hand = load_masked(settings).model
    endings = {"bert": ("output.dense",), "distilbert": ("out_lin", "ffn.lin2")}
    kind = by_hand.config.model_type
    for name, module in by_hand.named_modules():
        inside = name.startswith(by_hand.base_model_prefix)
        if inside and name.endswith(endings.get(kind, ("output.dense",))):
            module.weight.data.mul_(1 + gains)
    assert after.nll == pytest.approx(measure_masked(by_hand, masked).nll, rel=1e-4, abs=1e-4)


def test_full_weights_replace_the_encoder_and_leave_the_head_alone(roberta, tmp_path):
    rule = tiny_encoders.write_rows(tmp_path / "rule.jsonl", tiny_encoders.rule_rows(60))
    values = tiny_encoders.plan(roberta, rule, methods=["full"], train={"lr": 0.01, "checkpoint_steps": 50})
    adapt(values, tmp_path / "full")
    base = load_masked(build_plan(values).model)
    head = {name: tensor.clone() for name, tensor in base.model.lm_head.state_dict().items()}
    encoder = base.model.roberta.encoder.layer[0].output.dense.weight.clone()
    with attached_to_language_model(base, tmp_path / "full", build_plan(values)) as model:
        assert all(torch.equal(tensor, head[name]) for name, tensor in model.lm_head.state_dict().items())
        assert not torch.equal(model.roberta.encoder.layer[0].output.dense.weight, encoder)
    assert torch.equal(base.model.roberta.encoder.layer[0].output.dense.weight, encoder)


def test_base_and_adapters_are_compared_on_text(roberta, tmp_path):
    plan = text_plan(roberta, tmp_path, data={"validation_tokens": 512})
    same = classifier_adapter(roberta, tmp_path / "same")
    figures = compare_masked(plan, [same, classifier_adapter(roberta, tmp_path / "moved", gains=0.5)])
    assert [figure.domain for figure in figures] == ["prose"] * 3 + ["code"] * 3
    base, same, moved = figures[:3]
    assert (base.label, base.change) == ("base", None)
    assert (same.change, same.low, same.high) == (0.0, 0.0, 0.0) and same.perplexity == base.perplexity
    assert moved.low < moved.change < moved.high
    assert moved.change == pytest.approx(100 * (moved.perplexity / base.perplexity - 1))
    assert base.masked == moved.masked > 60
    json.dumps([figure.to_dict() for figure in figures])


def test_a_decoders_classifier_is_measured_on_text_under_the_causal_head(tmp_path):
    """As the same gains do inside the causal language model; and gains of 1 change nothing at all."""
    decoder = tiny_base.folder(tmp_path / "decoder", dtype=torch.float32)
    plan = text_plan(decoder, tmp_path)
    same = classifier_adapter(decoder, tmp_path / "same")
    base, same, moved, *_ = compare_adapters(plan, [same, classifier_adapter(decoder, tmp_path / "moved", gains=0.5)])
    assert (same.change, same.perplexity) == (0.0, base.perplexity)
    by_hand = load_base(plan.model)
    for name, module in by_hand.model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.weight.data.mul_(1.5)
    domain = load_domain(plan.data.domains[0], plan.data, by_hand.tokenizer)
    expected = measure(by_hand.model, domain.validation, domain.validation_bytes).perplexity
    assert moved.perplexity == pytest.approx(expected, rel=1e-4) and not is_masked(plan.model)


def test_blocks_are_packed_text_between_special_tokens(roberta, tmp_path):
    plan = text_plan(roberta, tmp_path)
    masked = load_masked_blocks(plan.data.domains[0], plan.data, TOKENIZER, seed=0)
    assert masked.input_ids.shape[1] == plan.data.block_size
    whole = torch.where(masked.labels == -100, masked.input_ids, masked.labels)
    assert json.dumps(TOKENIZER.decode(whole[0, 1:21]))[1:-1] in (tmp_path / "prose.jsonl").read_text()


def test_what_has_no_masked_head_or_another_base_is_refused(roberta, tmp_path):
    decoder = tiny_base.folder(tmp_path / "decoder")
    message = r"is a LlamaForCausalLM; masked-LM perplexity needs an encoder"
    refused(BaseModelError, message, compare_masked, text_plan(decoder, tmp_path), [])
    settings = ModelConfig(name=str(roberta), dtype="fp32", device="cpu")
    load_classifier(settings, ("a", "b"), seed=0).model.save_pretrained(tmp_path / "headless")
    TOKENIZER.save_pretrained(tmp_path / "headless")
    headless = text_plan(tmp_path / "headless", tmp_path)
    refused(BaseModelError, r"weights are missing.*lm_head", compare_masked, headless, [])
    long = text_plan(roberta, tmp_path, data={"block_size": 600, "train_tokens": 1200, "validation_tokens": 600})
    refused(ConfigError, r"block_size is 600, but model .* takes 512 tokens at most", compare_masked, long, [])
    other = text_plan(tiny_encoders.folder(tmp_path / "other", seed=5), tmp_path)
    adapters = [classifier_adapter(roberta, tmp_path / "adapter")]
    refused(BaseMismatchError, "was trained on", compare_masked, other, adapters)
