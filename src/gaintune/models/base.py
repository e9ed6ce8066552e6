"""Load a base model with its tokenizer, and say in which precision, on which device and with which identity."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gaintune.config import ModelConfig
from gaintune.errors import BaseModelError, ConfigError, one_line
from gaintune.models.checkpoints import Checkpoint, locate
from gaintune.models.fingerprint import fingerprint_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A loaded base model, in evaluation mode; `folder` holds its files, `fingerprint` identifies them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str
    folder: Path
    revision: str | None = None


def resolve_device(name: str) -> torch.device:
    """Return the device of a name: auto is this process's CUDA device where there is one, else the CPU.

    Of several processes on one machine (`accelerate launch`) each has a device of its own.

    Raises:
        ConfigError: a name that is no device, or a device this machine lacks.
    """
    if name == "auto":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"model.device {name!r} is not a device: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            have = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device"
            raise ConfigError(f"model.device is {name!r}, but torch sees {have} here; use auto or cpu")
        return torch.device("cuda", device.index or 0)
    return device


def cpu_has_fast_bf16() -> bool:
    """Return whether the processor multiplies bf16 matrices itself (AVX-512-BF16 or AMX-BF16)."""
    if hasattr(torch.cpu, "get_capabilities"):
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    listing = Path("/proc/cpuinfo")  # torch before 2.10 does not say
    flags = set(listing.read_text(encoding="utf-8").split()) if listing.is_file() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; auto is bf16 where the device computes in it, fp16 on older GPUs, else fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_fast_bf16() else torch.float32


def load_base(config: ModelConfig | str, *, dtype: torch.dtype | None = None) -> Base:
    """Load a causal language model, its tokenizer and its fingerprint.

    Args:
        config: the base; or its name alone: hub id, local folder, .gguf file, 'demo' or 'demo-gemma'.
        dtype: overrides `config.dtype`; full fine-tuning and merging need fp32.

    Raises:
        AssetError: its files cannot be fetched.
        BaseModelError: they are not a causal language model that can be loaded so.
        ConfigError: the device is not there.
    """
    config = ModelConfig(name=config) if isinstance(config, str) else config
    device = resolve_device(config.device)
    dtype = dtype or resolve_dtype(config.dtype, device)
    checkpoint = locate(config)
    _check_causal(checkpoint, config)
    tokenizer = tokenizer_of(checkpoint, config)
    model = load_model(checkpoint, dtype, device, **loading_options(config))
    return with_identity(model, tokenizer, checkpoint, config)


def loading_options(config: ModelConfig) -> dict[str, Any]:
    """Return the options of `read_weights` that a plan gives; no `device_map` where a device was chosen since."""
    return {
        "quantization": config.quantization,
        "trust_remote_code": config.trust_remote_code,
        "device_map": config.device_map if config.device == "auto" else None,
    }


def with_identity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, config: ModelConfig
) -> Base:
    """Return a loaded model and its tokenizer, with the fingerprint of their folder."""
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if len(tokenizer) > rows:  # harmless as long as text never turns into the tokens beyond, such as a padding token
        logger.warning("%s: its tokenizer has %d tokens, its embedding only %d", config.name, len(tokenizer), rows)
    fingerprint = fingerprint_folder(checkpoint.folder, trust_remote_code=config.trust_remote_code)
    return Base(model, tokenizer, checkpoint.name, fingerprint, checkpoint.folder, checkpoint.revision)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer alone; raises as `load_base` does."""
    return tokenizer_of(locate(config), config)


def base_fingerprint(config: ModelConfig) -> str:
    """Return the identity of a base from its files, without loading the model; raises as `load_base` does."""
    return fingerprint_folder(locate(config).folder, trust_remote_code=config.trust_remote_code)


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kind: Any = None,
    **options: Any,
) -> PreTrainedModel:
    """Load the weights of a folder, in evaluation mode; every weight must be there.

    `kind` is the class to load them into, a causal language model's unless given; `options` go to `read_weights`.
    """
    from transformers import AutoModelForCausalLM

    kind = kind or AutoModelForCausalLM
    model, missing = read_weights(kind, checkpoint, dtype, device, **options)
    if missing:
        raise BaseModelError(
            f"model {checkpoint.name!r}: {len(missing)} weights are missing from {checkpoint.folder}, the first is "
            f"{missing[0]}; transformers would have made them up at random"
        )
    return model


def read_weights(
    kind: Any,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantization: str | None = None,
    unquantized: Sequence[str] = (),
    trust_remote_code: bool = False,
    device_map: str | None = None,
    **changes: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """Load a folder's weights into a class of transformers, in evaluation mode.

    Args:
        kind: the class, such as `AutoModelForCausalLM`.
        device: where they go; with a `device_map`, "auto", accelerate spreads them over all visible devices.
        unquantized: modules that stay as they are under `quantization`, beside the output embedding.
        changes: fields of the model's config to set, such as `num_labels`.

    Returns:
        The model, and the names of the weights that the folder lacks or has in another shape, sorted: those have
        random values now.
    """
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    if quantization:
        options["quantization_config"] = _quantization(quantization, dtype, device, unquantized)
    if device_map or quantization or device.type != "cpu":
        options["device_map"] = device_map or {"": device}
    if changes:
        options |= {**changes, "ignore_mismatched_sizes": True}
    shown = f"model {checkpoint.name!r}"
    try:
        loaded: Any = kind.from_pretrained(checkpoint.folder, output_loading_info=True, **options)
    except torch.cuda.OutOfMemoryError:
        advice = f"does not fit on {device} in {DTYPE_NAMES[dtype]}: try model.quantization=4bit"
        raise BaseModelError(f"{shown} {advice}") from None
    except Exception as error:  # safetensors, transformers and torch each have their own
        reason = one_line(error)[:300] or type(error).__name__
        advice = f"{checkpoint.folder} cannot be loaded ({reason}); fetch or save it again"
        raise BaseModelError(f"{shown}: {advice}") from error
    model, report = loaded
    devices = map(str, (getattr(model, "hf_device_map", None) or {}).values())
    if device.type == "cuda" and not {"cpu", "disk"}.isdisjoint(devices):
        raise BaseModelError(
            f"{shown} does not fit on all visible devices together in {DTYPE_NAMES[dtype]}, and what is kept elsewhere "
            "cannot be trained: try model.quantization=4bit, or more devices"
        )
    model.name_or_path = checkpoint.name  # what PEFT writes into an adapter as its base
    model.config._name_or_path = checkpoint.name
    return model.eval(), sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})


def save_model(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """Write a model as safetensors, even if its generation settings contradict each other, as some do."""
    saved: Any = model
    try:
        if getattr(saved, "generation_config", None) is not None:  # a classifier has none
            saved.generation_config.validate(strict=True)
    except ValueError:  # a temperature without sampling: transformers reads such settings but refuses to write them
        saved.generation_config.do_sample = True
        logger.info("generation settings name a temperature without sampling; writing them with sampling on")
    model.save_pretrained(folder, **options)


def read_architecture(checkpoint: Checkpoint, settings: ModelConfig) -> PreTrainedConfig:
    """Read the model's own config; refuse one that cannot be read, and quantizing what is stored quantized."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # invalid JSON, unknown model type, or code that would have to be run
        reason = one_line(error)[:300]
        raise BaseModelError(f"model {checkpoint.name!r}: its config.json cannot be read ({reason})") from error
    if settings.quantization and getattr(config, "quantization_config", None):
        raise BaseModelError(f"model {checkpoint.name!r} is stored quantized already: leave model.quantization out")
    return config


def _check_causal(checkpoint: Checkpoint, settings: ModelConfig) -> None:
    """Refuse what is not a decoder before its weights are read: AutoModelForCausalLM takes an encoder silently."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_architecture(checkpoint, settings)
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    known = {known} if isinstance(known, str) else set(known)
    named = set(config.architectures or ())
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder or not (own_code or (known & named if named else known)):
        kind = ", ".join(sorted(named)) or config.model_type
        raise BaseModelError(f"model {checkpoint.name!r} is a {kind}; a causal language model (decoder only) is needed")


def _quantization(name: str, dtype: torch.dtype, device: torch.device, unquantized: Sequence[str] = ()) -> Any:
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise BaseModelError(f"model.quantization={name} needs bitsandbytes: pip install 'gaintune[quantization]'")
    if device.type == "cpu":
        logger.warning("%s on the CPU: fine for trying out; bitsandbytes is made for CUDA, train and merge there", name)
    skipped = list(unquantized) or None  # None leaves transformers its own choice
    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    nested = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **nested, llm_int8_skip_modules=skipped)


def tokenizer_of(checkpoint: Checkpoint, config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a base's folder, made to begin texts as the model's do; raises as `load_base` does."""
    from transformers import AutoTokenizer

    folder = checkpoint.folder
    shown = f"model {checkpoint.name!r}"
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise BaseModelError(f"{shown}: no tokenizer in {folder} (none of {', '.join(TOKENIZER_FILES)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        kind, stated = (_read_keys(folder / file) for file in ("config.json", "tokenizer_config.json"))
        begin_texts(tokenizer, kind.get("model_type"), stated=stated.get("add_bos_token") is True)
        return tokenizer
    except Exception as error:  # a damaged file raises an error of its parser's
        reason = one_line(error)[:300]
        raise BaseModelError(f"{shown}: the tokenizer in {folder} cannot be loaded ({reason})") from error


def begin_texts(tokenizer: PreTrainedTokenizerBase, model_type: str | None, *, stated: bool = False) -> None:
    """Make a tokenizer put its beginning-of-text token before every text, if the model was trained with one.

    Nothing changes where it puts special tokens around a text already, or has no such token. transformers 5 does not
    read `add_bos_token` of a tokenizer_config.json that lies beside a tokenizer.json.

    Args:
        tokenizer: changed in place; slow ones are left alone.
        model_type: of the model's config. Gemma of every generation was trained with the token, whatever files say:
            without it, its perplexity is several times what it should be.
        stated: whether the tokenizer's settings, or those of its .gguf file, state that the token is added.
    """
    wrapped: Any = tokenizer
    if not (stated or "gemma" in (model_type or "")) or not tokenizer.is_fast or tokenizer.bos_token_id is None:
        return
    if wrapped("a")["input_ids"] == wrapped("a", add_special_tokens=False)["input_ids"]:
        wrapped.add_bos_token = True


def _read_keys(file: Path) -> dict[str, Any]:
    """Read a JSON file's keys; none where it is not there."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
