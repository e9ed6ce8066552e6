"""The identity of a base model: a hash over its config and a fixed sample of every weight, read from its files.

It is taken from the checkpoint and not from the loaded model, so loading in another dtype or in 4 bits does not change
it. A base converted from a .gguf file is identified by the converted folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from gaintune.errors import BaseModelError, one_line
from gaintune.models.checkpoints import weight_files

SCATTERED = 256  # single values spread over a tensor; each may cost a read of the disk
LONGEST_RUN = 65536  # values of one contiguous run
GOLDEN = (math.sqrt(5) - 1) / 2

# What decides the computation and is not already in the tensors' names and shapes. Everything else in a config
# differs between versions of transformers for one and the same model.
FACTS = (
    "model_type", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_parameters", "sliding_window", "tie_word_embeddings",
    "num_experts_per_tok", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling",
)  # fmt: skip
ROPE_FACTS = (
    "rope_type", "rope_theta", "factor", "partial_rotary_factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
    "short_factor", "long_factor",
)  # fmt: skip
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "U16": "<u2", "BOOL": "u1"}


def fingerprint_folder(folder: Path, *, trust_remote_code: bool = False) -> str:
    """Return 64 hexadecimal digits for a model folder with config.json and safetensors weights.

    Of each tensor it takes the name, the shape and a sample: the first, middle and last run of its last dimension
    (so that every input column of a linear layer is seen) and 256 values spread over all of it. Values are rounded to
    bf16 first: the same values saved in another float type give the same fingerprint, and a change that bf16 cannot
    show anywhere in the sample is not seen. Of a 70B model that is less than 1 GB.

    Raises:
        BaseModelError: no config, no safetensors weights, or a file that is cut short.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(config_facts(folder, trust_remote_code), sort_keys=True).encode())
    samples: dict[str, bytes] = {}
    for file in weight_files(folder):
        samples.update(_file_samples(file))
    for name in sorted(samples):
        digest.update(samples[name])
    return digest.hexdigest()


def config_facts(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return the part of a config that decides what a model computes, in the spelling of today's transformers."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"{folder}: its config.json cannot be read ({one_line(error)[:300]})") from error
    text = config.get_text_config()
    facts = {key: _plain(getattr(text, key, None)) for key in FACTS}
    return {key: value for key, value in facts.items() if value is not None}


def _plain(value: Any) -> Any:
    """Round numbers to six digits (a .gguf file stores 1e-5 as 9.9999997e-6); keep the rope settings that matter."""
    if isinstance(value, dict):
        kept = {key: _plain(entry) for key, entry in value.items() if key in ROPE_FACTS or isinstance(entry, dict)}
        return {key: entry for key, entry in kept.items() if entry is not None}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(f"{value:.6g}")
    return value if isinstance(value, (str, bool, type(None))) else str(value)


def _file_samples(file: Path) -> dict[str, bytes]:
    """Return the bytes to hash of each tensor of a safetensors file, by name; values are read through a memory map."""
    with file.open("rb") as handle:
        size = file.stat().st_size
        try:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (struct.error, ValueError, KeyError, MemoryError, OverflowError, AttributeError):
            raise BaseModelError(f"{file}: not a safetensors file, or cut short; fetch it again") from None
        if end > size:
            raise BaseModelError(f"{file}: cut short ({size} of {end} bytes); fetch it again")
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
            if hasattr(mmap, "MADV_RANDOM"):  # else the system reads 128 KB around every value that is read
                view.madvise(mmap.MADV_RANDOM)
            return {name: _tensor_sample(name, entry, view, 8 + length) for name, entry in header.items()}


def _tensor_sample(name: str, entry: dict[str, Any], view: mmap.mmap, start: int) -> bytes:
    kind, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = (start + offset for offset in entry["data_offsets"])
    if kind in FLOATS:
        stored, label = np.dtype(FLOATS[kind]), "float"
    else:
        stored, label = np.dtype(INTEGERS.get(kind, "u1")), kind
    values = np.frombuffer(view, stored, count=(end - begin) // stored.itemsize, offset=begin)
    sample = values[sample_positions(len(values), shape[-1] if shape else 1)].copy()
    del values  # the map cannot be closed while an array looks into it
    if label == "float":
        sample = _as_bf16(sample, kind)
    return f"{name}|{label}|{shape}|".encode() + sample.tobytes()


def sample_positions(elements: int, run: int) -> np.ndarray:
    """Choose the values of a flat tensor to read: three whole runs of its last dimension, and scattered ones."""
    if elements == 0:
        return np.zeros(0, dtype=np.int64)
    run = max(1, min(run, elements, LONGEST_RUN))
    middle = (elements // run) // 2 * run
    runs = [np.arange(first, first + run) for first in (0, min(middle, elements - run), elements - run)]
    # multiples of the golden ratio fall on rows and columns alike, where a fixed stride could stay in one column
    spread = (np.arange(1, SCATTERED + 1) * GOLDEN % 1.0 * elements).astype(np.int64)
    return np.unique(np.concatenate([*runs, spread]))


def _as_bf16(values: np.ndarray, kind: str) -> np.ndarray:
    """Return the 16 bits of each value rounded to bf16, to the nearest and halves to even."""
    if kind == "BF16":
        return values
    with np.errstate(over="ignore"):
        bits = values.astype("<f4").view("<u4").astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype("<u2")
