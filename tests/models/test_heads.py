"""A head's parts, by whatever name a model has for them, are new, in fp32 and never quantized."""

import pytest
import torch
from transformers import AutoModelForMaskedLM, ModernBertConfig

from gaintune.config import ModelConfig
from gaintune.errors import BaseModelError
from gaintune.models import load_classifier
from support import tiny_encoders


@pytest.fixture(scope="module")
def modernbert(tmp_path_factory):
    """A model whose head has a part called "head", which no list of names for heads knows."""
    folder = tmp_path_factory.mktemp("modernbert")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    config = ModernBertConfig(vocab_size=tiny_encoders.VOCABULARY, max_position_embeddings=64, **sizes, **ids)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tiny_encoders.tokenizer().save_pretrained(folder)
    return folder


def load(folder, **options):
    config = ModelConfig(name=str(folder), dtype="bf16", device="cpu", **options)
    return load_classifier(config, ("no", "yes"), seed=0)


def test_every_part_of_a_head_is_in_fp32(modernbert):
    base = load(modernbert)
    assert base.head == ("head", "classifier")
    for name in base.head:
        assert {p.dtype for p in base.model.get_submodule(name).parameters()} == {torch.float32}


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_part_that_was_quantized_with_the_base_is_refused(modernbert, quantization):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(BaseModelError, match=r"head, a part of its new head, was quantized with the base"):
        load(modernbert, quantization=quantization)
