"""The chunked loss against a float64 reference, plain logits, and models with their own ways of making logits."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM as Auto
from transformers import Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, OPTConfig

from gaintune.models import NextTokenLoss
from gaintune.models import loss as loss_module
from gaintune.models.loss import chunked_cross_entropy, token_losses

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 7)  # several chunks, the last one shorter


def reference(hidden, weight, targets, bias=None, softcap=None):
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradients_equal_a_float64_reference(softcap, with_bias):
    torch.manual_seed(0)
    hidden, weight = torch.randn(25, 16), torch.randn(97, 16)
    bias = torch.randn(97) if with_bias else None
    targets = torch.randint(0, 97, (25,))
    targets[[3, 11]] = -100
    given = [t.clone().requires_grad_() if t is not None else None for t in (hidden, weight, bias)]
    exact = [t.double().requires_grad_() if t is not None else None for t in (hidden, weight, bias)]
    value = chunked_cross_entropy(given[0], given[1], targets, given[2], softcap)
    expected = reference(exact[0], exact[1], targets, exact[2], softcap)
    (value * 0.3).backward()
    (expected * 0.3).backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(given, exact, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


def test_losses_of_single_tokens_add_up():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(25, 16), torch.randn(97, 16), torch.randint(0, 97, (25,))
    losses = token_losses(hidden, weight, targets)
    assert losses.shape == (25,)
    torch.testing.assert_close(losses.sum(), chunked_cross_entropy(hidden, weight, targets))


def test_bf16_hidden_states_keep_the_softmax_in_fp32():
    torch.manual_seed(0)
    hidden = torch.randn(40, 16).bfloat16().requires_grad_()
    weight, targets = torch.randn(97, 16).bfloat16(), torch.randint(0, 97, (40,))
    value = chunked_cross_entropy(hidden, weight, targets)
    expected = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)
    value.backward()
    assert hidden.grad.dtype == torch.bfloat16


CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2-softcap": Gemma2Config(**SIZES, **GEMMA),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
    "granite-scaled-logits": GraniteConfig(**SIZES, logits_scaling=3.0),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_s_loss_equals_the_one_from_its_own_logits(name):
    torch.manual_seed(0)
    model = Auto.from_config(CONFIGS[name]).eval()
    twin, tokens = copy.deepcopy(model), torch.randint(0, 97, (3, 11))
    batch, loss = {"input_ids": tokens, "labels": tokens}, NextTokenLoss(model)
    assert loss.chunked == (name != "granite-scaled-logits")
    value = loss.sum(model, batch)
    logits = twin(tokens).logits[:, :-1].flatten(0, 1).float()
    expected = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss.per_token(model, batch).sum(), expected, rtol=1e-5, atol=1e-4)
    value.backward()
    expected.backward()
    for (key, ours), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=key)


def test_the_first_token_of_a_block_and_ignored_labels_are_not_scored():
    model = Auto.from_config(CONFIGS["llama"]).eval()
    tokens = torch.randint(0, 97, (2, 9))
    labels = tokens.clone()
    labels[:, :5] = -100
    loss = NextTokenLoss(model)
    expected = loss.per_token(model, {"input_ids": tokens, "labels": tokens})[:, 4:].sum()
    torch.testing.assert_close(loss.sum(model, {"input_ids": tokens, "labels": labels}), expected)
