"""Rows longer than a model takes are refused; texts packed into one block compute as they do alone, or are refused."""

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from gaintune.config import MethodConfig, ModelConfig, TrainConfig
from gaintune.data import IGNORED, Examples
from gaintune.errors import ConfigError
from gaintune.evaluate import measure
from gaintune.methods import StagePosition, prepare_method
from gaintune.models import NextTokenLoss, longest_row, require_isolation, require_rows
from gaintune.training import train_stage
from gaintune.tuners.gain import GainConfig
from support import refused, tiny_base

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
KEEPS = {
    "gpt2": hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
    "gemma3": hf.Gemma3TextConfig(**GATED, head_dim=8, sliding_window=8),
    "mistral": hf.MistralConfig(**GATED, sliding_window=4),
    "mixtral": hf.MixtralConfig(**GATED, num_local_experts=4),
}
MIXES = {
    "bloom": hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "falcon": hf.FalconConfig(**SIZES),
    "opt": hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "mamba": hf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def made(config):
    torch.manual_seed(0)
    return tiny_base.sharpen(hf.AutoModelForCausalLM.from_config(config).eval())


def block(*lengths: int, padding: int = 0, seed: int = 0) -> tuple[Examples, list[torch.Tensor]]:
    """One packed block of random rows, half of each scored, and the rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 97, (length,), generator=generator) for length in lengths]
    ids = torch.cat([*rows, torch.zeros(padding, dtype=torch.long)])
    halves = [torch.where(torch.arange(len(row)) < len(row) // 2, IGNORED, row) for row in rows]
    labels = torch.cat([*halves, torch.full((padding,), IGNORED)])
    positions = torch.cat([torch.arange(length) for length in (*lengths, padding)])
    return Examples(ids[None], labels[None], positions[None]), rows


STRETCHED = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
LLAMA3 = {**STRETCHED, "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {**STRETCHED, "rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(("config", "longest"), [
    (hf.GPT2Config(n_positions=64), 64),
    (hf.LlamaConfig(max_position_embeddings=64), 64),
    (hf.LlamaConfig(max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), 128),
    (hf.LlamaConfig(max_position_embeddings=256, rope_parameters=LLAMA3), 256),
    (hf.LlamaConfig(max_position_embeddings=64, rope_parameters=YARN), 256),
    (hf.BloomConfig(), None),
    (hf.FalconConfig(max_position_embeddings=64, alibi=True), None),
])  # fmt: skip
def test_the_longest_row_is_what_positions_reach(config, longest):
    assert longest_row(config) == longest


def test_a_row_longer_than_trained_positions_is_refused():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    require_rows(model, 16, packed=False)
    with pytest.raises(ConfigError, match=r"data\.block_size is 17, but model .* takes 16 tokens at most"):
        require_rows(model, 17, packed=False)


@pytest.mark.parametrize("name", ["llama", *KEEPS])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_in_a_pack_has_the_logits_it_has_alone_whatever_stands_beside_it(name, attention):
    model = tiny_base.model() if name == "llama" else made(KEEPS[name])
    model.eval().set_attn_implementation(attention)
    lengths = (7, 12, 5)
    examples, rows = block(*lengths, padding=6)
    other, _ = block(7, 12, 5, padding=6, seed=1)
    changed = examples.input_ids.clone()
    changed[0, :7] = other.input_ids[0, :7]
    changed[0, 24:] = 3
    with torch.no_grad():
        logits = model(examples.input_ids, position_ids=examples.position_ids, use_cache=False).logits[0]
        beside = model(changed, position_ids=examples.position_ids, use_cache=False).logits[0]
        alone = [model(row[None], use_cache=False).logits[0] for row in rows]
    exact = {"rtol": 0, "atol": 0} if name != "mixtral" else {"rtol": 1e-5, "atol": 1e-5}  # experts group rows anew
    torch.testing.assert_close(beside[7:24], logits[7:24], **exact)
    assert not torch.allclose(beside[:7], logits[:7], atol=1e-2)
    for piece, single in zip(logits[:24].split(lengths), alone, strict=True):
        torch.testing.assert_close(piece, single, rtol=1e-4, atol=1e-4)
    require_isolation(model)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_loss_of_packed_rows_is_that_of_the_rows_alone(batch_size):
    model = tiny_base.model()
    blocks = [block(*lengths, padding=24 - sum(lengths), seed=sum(lengths)) for lengths in ((7, 9, 5), (24,), (2, 3))]
    examples = Examples(
        *(torch.cat([getattr(each, part) for each, _ in blocks]) for part in ("input_ids", "labels", "position_ids"))
    )
    packed = measure(model, examples, (1, 1, 1), batch_size=batch_size)
    for (_, rows), found, scored in zip(blocks, packed.nll, packed.tokens, strict=True):
        expected = 0.0
        for row in rows:
            with torch.no_grad():
                logits = model(row[None]).logits[0].double()
            start = max(len(row) // 2, 1)
            expected -= logits[start - 1 : -1].log_softmax(1).gather(1, row[start:, None]).sum().item()
        assert found == pytest.approx(expected, rel=1e-5)
        assert scored == sum(len(row) - max(len(row) // 2, 1) for row in rows)


def test_gradients_of_packed_rows_are_those_of_the_rows_alone():
    examples, rows = block(7, 12, 5, padding=3)
    model, twin = tiny_base.model(), tiny_base.model()
    NextTokenLoss(model).sum(model, examples[:]).backward()
    loss = NextTokenLoss(twin)
    for row in rows:
        labels = torch.where(torch.arange(len(row)) < len(row) // 2, IGNORED, row)
        loss.sum(twin, {"input_ids": row[None], "labels": labels[None]}).backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", MIXES)
def test_a_model_that_mixes_packed_rows_is_refused_in_measuring_and_in_training(name, tmp_path):
    model = made(MIXES[name])
    examples, _ = block(7, 12, 5)
    says = rf"^{type(model).__name__} lets one text of a packed row reach the next: set data\.packing=false"
    refused(ConfigError, says, measure, model, examples, (1,))
    with pytest.raises(ConfigError, match=says):
        method = prepare_method(MethodConfig(name="full"), ModelConfig(dtype="fp32", device="cpu"), TrainConfig())
        train_stage(model, method, examples, TrainConfig(), StagePosition(), checkpoints=tmp_path)
    alone = Examples(examples.input_ids, examples.labels)
    assert measure(model, alone, (1,)).tokens == examples.scored, "one text in a row is fine"


def test_a_model_that_ignores_positions_in_its_mask_only_is_refused():
    """A block-diagonal mask with running positions: nothing leaks, and yet no row is where it is alone."""
    model = made(KEEPS["gpt2"])
    embedding = model.transformer.wpe

    def shifted(module, arguments):
        (positions,) = arguments
        return (torch.arange(positions.shape[1]).expand_as(positions),)

    embedding.register_forward_pre_hook(shifted)
    refused(ConfigError, "treats a text in a packed row other than the text alone", require_isolation, model)


def test_logits_that_are_not_finite_are_not_blamed_on_packing():
    row = "model.layers.1.self_attn.o_proj"
    dora = tiny_base.model()
    dora.get_submodule(row).weight.data[3] = 0
    adapted = get_peft_model(dora, LoraConfig(r=2, use_dora=True, target_modules=["o_proj"]))
    broken = tiny_base.model()
    broken.get_submodule(row).weight.data[3, 3] = torch.nan
    for model, module in ((adapted, rf"{row}\S+ \(DoraLinearLayer\)"), (broken, rf"{row} \(Linear\)")):
        message = rf"LlamaForCausalLM gives logits that are not finite, from {module} on: no setting of data\.packing"
        refused(ConfigError, message, require_isolation, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [GainConfig(ffn=True), LoraConfig(r=2, target_modules="all-linear")])
def test_a_model_with_an_adapter_passes_and_keeps_its_mode(config, dtype):
    model = get_peft_model(tiny_base.model().to(dtype), config).train()
    require_isolation(model)
    assert model.training
