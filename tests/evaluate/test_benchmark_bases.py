"""Adapters put on a base for benchmarks and taken off again: the base is the untouched one, in the right numbers."""

import pytest
import torch

from support import tiny_base

pytest.importorskip("lm_eval", reason="benchmarks need lm-eval: pip install 'gaintune[benchmarks]'")

from peft.tuners.tuners_utils import BaseTunerLayer

from gaintune.adapters import AdapterRecord, attached, load_adapter, save_adapter
from gaintune.config import MethodConfig, ModelConfig
from gaintune.evaluate.benchmarks import base_of as base_of_report
from gaintune.evaluate.benchmarks import benchmark_adapters, run_benchmarks
from gaintune.evaluate.benchmarks.records import find_score
from gaintune.evaluate.benchmarks.run import measure_benchmarks
from gaintune.methods import attach
from gaintune.models import load_base
from support.benchmark_world import NAMES, Watch, adapter, base_of, config_of, edit, logits


@pytest.mark.parametrize("method", ["gain-ffn", "lora", "disel", "ia3", "pissa", "full"])
def test_the_base_is_the_untouched_one_and_is_left_so(tiny, data, tmp_path, method):
    folder = adapter(tiny, tmp_path / "adapter", method)
    config, base = config_of(data), base_of(tiny)
    before = logits(base.model)
    report = run_benchmarks(base, {"mine": folder}, config)
    assert torch.equal(logits(base.model), before)
    assert not hasattr(base.model, "peft_config")

    plain = base_of(tiny)
    assert report.base == measure_benchmarks(plain.model, plain.tokenizer, config)
    adapted = load_adapter(plain, folder)
    assert report.adapted["mine"] == measure_benchmarks(adapted, plain.tokenizer, config)
    assert report.score("lambada_openai", "perplexity") != report.score("lambada_openai", "perplexity", "mine")


def test_switching_an_adapter_off_is_trusted_only_where_it_gives_the_base_back(tiny, tmp_path):
    for method, expected in (("gain-ffn", True), ("pissa", False), ("full", False)):
        base = base_of(tiny)
        with attached(base, adapter(tiny, tmp_path / method, method)) as (_, gives_back):
            assert gives_back is expected, method


def test_weights_trained_whole_are_measured_in_their_own_numbers(tiny, data, tmp_path):
    """On a bf16 base they are not rounded to it, and the base beside them is not either."""
    whole, gains = adapter(tiny, tmp_path / "whole", "full"), adapter(tiny, tmp_path / "gains", "gain-ffn")
    model, config, watch = ModelConfig(name=str(tiny), device="cpu", dtype="bf16"), config_of(data), Watch()
    report = benchmark_adapters(model, {"gains": gains, "whole": whole}, config, progress=watch)
    assert watch.titles == [f"{who}: {name}" for who in ("base", "gains", "whole", "base") for name in NAMES]
    numbers = {"base": "bfloat16", "gains": "bfloat16", "whole": "float32-autocast-bfloat16"}
    assert report.settings["numbers"] == numbers
    assert list(report.adapted) == ["gains", "whole"]

    base = base_of(tiny)
    mixed = {"mixed_precision": torch.bfloat16}
    assert base_of_report(report, "whole") == measure_benchmarks(base.model, base.tokenizer, config, **mixed)
    in_fp32 = find_score(measure_benchmarks(base.model, base.tokenizer, config), "lambada_openai", "perplexity")
    in_both = find_score(base_of_report(report, "whole"), "lambada_openai", "perplexity")
    assert in_both.items != in_fp32.items, "fp32 under autocast is not fp32"
    assert in_both.items == pytest.approx(in_fp32.items, rel=0.05)
    adapted = load_adapter(base, whole)
    assert report.adapted["whole"] == measure_benchmarks(adapted, base.tokenizer, config, **mixed)
    rounded = load_base(model)
    assert report.base == base_of_report(report, "gains")
    assert report.base == measure_benchmarks(rounded.model, rounded.tokenizer, config)
    assert report.adapted["whole"] != measure_benchmarks(load_adapter(rounded, whole), rounded.tokenizer, config)
    turned = benchmark_adapters(model, {"whole": whole, "gains": gains}, config)
    assert (list(turned.adapted), turned.settings["numbers"]["base"]) == (["whole", "gains"], numbers["whole"])
    assert turned.adapted == report.adapted


def test_weights_trained_whole_are_said_to_be_rounded_where_they_are(tiny, data, tmp_path, caplog):
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
    assert not hasattr(base.model, "peft_config")
    assert torch.equal(logits(base.model), before)


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
    base = load_base(ModelConfig(name=str(folder), device="cpu", dtype="fp32", trust_remote_code=True))
    before, start = logits(base.model), {name: value.clone() for name, value in base.model.state_dict().items()}
    model = attach(base.model, MethodConfig(name="full"), seed=0)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    save_adapter(model, tmp_path / "whole", AdapterRecord(base.name, base.fingerprint, "full", "full", ("prose",)))
    base = load_base(ModelConfig(name=str(folder), device="cpu", dtype="fp32", trust_remote_code=True))
    with attached(base, tmp_path / "whole"):
        assert not torch.equal(logits(base.model), before)
    assert torch.equal(logits(base.model), before)
    assert all(torch.equal(value, start[name]) for name, value in base.model.state_dict().items())
