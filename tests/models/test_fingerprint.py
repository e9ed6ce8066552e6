"""The identity of a base: what must not change it, and what must."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gaintune.errors import BaseModelError
from gaintune.models import fingerprint_folder
from gaintune.models.fingerprint import _as_bf16, config_facts, sample_positions
from support import refused, tiny_base
from support.files import edit_json


@pytest.fixture
def tiny(tiny, tmp_path):
    """A copy of the shared model, to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "tiny"))


def edit_config(folder, **changes):
    edit_json(folder / "config.json", **changes)


def rewrite(folder, change):
    """Apply `change` to the weights in place and write them back."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_saving_again_in_another_dtype_or_in_shards_keeps_it(tiny, tmp_path):
    same = fingerprint_folder(tiny)
    assert len(same) == 64
    assert fingerprint_folder(tiny_base.folder(tmp_path / "fp32", dtype=torch.float32)) == same
    tiny_base.model().to(torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="15KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert fingerprint_folder(tmp_path / "sharded") == same


def test_the_fingerprints_of_adapters_already_saved_stay_valid(tmp_path):
    """A fixed model has a fixed fingerprint: whoever changes how it is taken orphans every adapter there is."""
    tiny_base.config().save_pretrained(tmp_path)
    tensors = {"a.weight": torch.arange(6000).reshape(60, 100) / 7, "b.bias": torch.arange(5, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint_folder(tmp_path) == "1516b4832a79026b223ae75cad145a5046906f0d3239b2bdd9006f0d4dd00812"


def test_what_does_not_decide_the_computation_does_not_change_it(tiny):
    same = fingerprint_folder(tiny)
    edit_config(tiny, transformers_version="4.0", _name_or_path="/elsewhere", dtype="float16", use_cache=False)
    assert fingerprint_folder(tiny) == same
    config = json.loads((tiny / "config.json").read_text())
    rope = config.pop("rope_parameters")
    (tiny / "config.json").write_text(json.dumps({**config, "rope_theta": rope["rope_theta"]}))  # the older spelling
    assert fingerprint_folder(tiny) == same
    edit_config(tiny, rms_norm_eps=1e-5)
    first = config_facts(tiny)
    edit_config(tiny, rms_norm_eps=9.999999747378752e-06)  # as a .gguf file rounds it
    assert config_facts(tiny) == first


OTHER = [{"num_attention_heads": 2}, {"rms_norm_eps": 1e-5}, {"hidden_act": "gelu"}, {"tie_word_embeddings": True}]
OTHER += [{"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}]


@pytest.mark.parametrize("change", OTHER, ids=str)
def test_a_config_that_computes_something_else_changes_it(tiny, change):
    before = fingerprint_folder(tiny)
    edit_config(tiny, **change)
    assert fingerprint_folder(tiny) != before


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0}


@pytest.mark.parametrize(("rope", "change"), [
    (LLAMA3, {"low_freq_factor": 2.0}),
    (LLAMA3, {"high_freq_factor": 5.0}),
    (LLAMA3, {"original_max_position_embeddings": 32}),
    (YARN, {"beta_fast": 16.0}),
    (YARN, {"beta_slow": 2.0}),
])  # fmt: skip
def test_every_number_that_places_are_turned_by_changes_it(tiny, rope, change):
    edit_config(tiny, rope_parameters=rope)
    before = fingerprint_folder(tiny)
    edit_config(tiny, rope_parameters=dict(reversed(rope.items())))
    assert fingerprint_folder(tiny) == before
    edit_config(tiny, rope_parameters={**rope, **change})
    assert fingerprint_folder(tiny) != before


def test_other_weights_names_shapes_and_types_change_it(tiny, tmp_path):
    prints = {fingerprint_folder(tiny), fingerprint_folder(tiny_base.folder(tmp_path / "seed", seed=1))}
    for change in (
        lambda tensors: tensors.update(extra=torch.zeros(1)),
        lambda tensors: tensors.update(extra=torch.zeros(1, 1)),
        lambda tensors: tensors.update(another=tensors.pop("extra")),
        lambda tensors: tensors.update(packed=torch.arange(64, dtype=torch.uint8)),
        lambda tensors: tensors.update(packed=torch.arange(64, dtype=torch.int8)),
        lambda tensors: tensors.update(packed=torch.zeros(64).to(torch.float8_e4m3fn)),  # which is taken as it is
    ):
        rewrite(tiny, change)
        prints.add(fingerprint_folder(tiny))
    assert len(prints) == 8


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("module", ["self_attn.o_proj", "mlp.down_proj"])
def test_one_merged_gain_in_one_layer_changes_it(tiny, module, axis):
    """One column (or row, as in GPT-2's layers) of one matrix by 2 %, about the least a GAIN adapter does."""
    before = fingerprint_folder(tiny)

    def merge(tensors):
        tensors[f"model.layers.1.{module}.weight"].select(axis, 17).mul_(1.02)

    rewrite(tiny, merge)
    assert fingerprint_folder(tiny) != before


@pytest.mark.parametrize("shape", [(4096, 14336), (14336, 4096)])
def test_one_per_cent_of_columns_or_rows_is_seen_in_a_large_matrix(shape):
    positions = sample_positions(shape[0] * shape[1], shape[1])
    rows, columns = np.unique(positions // shape[1]), np.unique(positions % shape[1])
    assert len(columns) == shape[1], "a change of any input column of a linear layer is seen"
    generator = np.random.default_rng(0)
    seen = [np.isin(generator.choice(shape[0], shape[0] // 100, replace=False), rows).any() for _ in range(200)]
    assert np.mean(seen) > 0.9 and len(positions) < 4 * shape[1] + 600


@pytest.mark.parametrize(("elements", "run"), [(0, 1), (1, 1), (5, 5), (7, 3), (10, 1), (200_000, 200_000)])
def test_sample_positions_stay_inside_and_reach_both_ends(elements, run):
    positions = sample_positions(elements, run)
    assert len(np.unique(positions)) == len(positions)
    if elements:
        assert positions.min() == 0 and positions.max() == elements - 1


def test_bf16_rounding_is_torchs():
    values = torch.cat([torch.randn(5000) * 10.0**e for e in range(-30, 30, 7)])
    values = torch.cat([values, torch.tensor([0.0, -0.0, 3.4e38, float("inf"), -float("inf")])])
    assert np.array_equal(_as_bf16(values.numpy(), "F32"), values.to(torch.bfloat16).view(torch.uint16).numpy())
    half = values[values.abs() < 6e4].half()
    assert np.array_equal(_as_bf16(half.numpy(), "F16"), half.to(torch.bfloat16).view(torch.uint16).numpy())


@pytest.mark.parametrize("content", [b"", b"12345", b"\xff" * 40, (2**60).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_not_safetensors_is_refused(tiny, content):
    (tiny / "model.safetensors").write_bytes(content)
    refused(BaseModelError, r"model\.safetensors: ", fingerprint_folder, tiny)


def test_many_tensors_take_seconds_at_most(tiny, record_property):
    """723 tensors as in a 70B model, narrower; the time is recorded and decides nothing."""
    matrix = torch.zeros(64, 8192, dtype=torch.bfloat16)
    rewrite(tiny, lambda tensors: tensors.update({f"layer.{i}.weight": matrix.clone() for i in range(100)}))
    start = time.perf_counter()
    fingerprint_folder(tiny)
    record_property("seconds", time.perf_counter() - start)
