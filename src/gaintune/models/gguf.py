"""A .gguf file becomes a plain transformers folder, once, in the cache."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from gaintune.errors import BaseModelError, one_line
from gaintune.storage import assets
from gaintune.storage.files import MANIFEST, complete_folder, sha256_file

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

CONVERSION = "1"  # raise when the conversion changes what it writes


def converted_folder(gguf: Path) -> Path:
    """The safetensors folder of a .gguf file, in the cache under the file's SHA-256; converted if it is not there.

    Raises:
        BaseModelError: transformers cannot read the file, or its architecture is unknown.
    """
    folder = place_of(gguf)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / MANIFEST).is_file():
            logger.info("converting %s to safetensors, once: %s", gguf.name, folder)
            _convert(gguf, folder)
    return folder


def place_of(gguf: Path) -> Path:
    """Where the folder of a .gguf file lies once it is converted: a name made of its content."""
    return assets.cache_dir() / "models" / f"{sha256_file(gguf)[:16]}-{CONVERSION}"


def storage_dtype(gguf: Path) -> torch.dtype:
    """The numbers to keep a .gguf file's weights in: its own when most are floats, bf16 when they are quantized.

    Values quantized to eight bits or fewer are several per cent from the original; what bf16 rounds off (0.2 %) is
    no loss beside that. It halves the folder, and a base is then the same whichever dtype it is loaded in.
    """
    import torch
    from gguf import GGUFReader

    elements: Counter[str] = Counter()
    for tensor in GGUFReader(str(gguf)).tensors:
        elements[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = elements.most_common(1)[0][0]
    return {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        dtype = storage_dtype(gguf)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=dtype, **_unpacked()
        )
    except Exception as error:  # the reader raises whatever the damaged field happens to break
        reason = one_line(error) or type(error).__name__
        raise BaseModelError(f"{gguf}: not a .gguf file transformers can read ({reason[:300]})") from error
    # The weights are plain numbers now; transformers still believes them quantized and would refuse to save.
    model.is_quantized = False
    for attribute in ("quantization_method", "hf_quantizer"):
        model.__dict__.pop(attribute, None)
    for config in (model.config, model.config.get_text_config()):
        for key in ("quantization_config", "_model_name_or_path"):
            config.__dict__.pop(key, None)
    with complete_folder(folder, ours=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _unpacked() -> dict[str, Any]:
    """Newer transformers keep the weights in their blocks where a kernel for them is installed, unless told not to."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
