"""Convert a .gguf file to a plain transformers folder, once, in the cache."""

from __future__ import annotations

import contextlib
import functools
import logging
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gguf
import numpy as np
from filelock import FileLock
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

from gaintune.errors import BaseModelError, one_line
from gaintune.storage import MANIFEST, assets, complete_folder, damage, read_json, sha256_file, write_json

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

CONVERSION = "2"  # raise when the conversion changes what it writes; 1 left out add_bos_token
SLAB = 2**16  # bytes of quantized weights that are unpacked at once, to stay in the cache of the processor

_verified: set[Path] = set()  # folders whose SHA-256 sums this process has checked
_patching = threading.Lock()  # held while functions of gguf are replaced


def converted_folder(source: Path) -> Path:
    """Return the safetensors folder of a .gguf file, in the cache under the file's SHA-256.

    The file is converted where the folder is not there yet, or damaged. Sums are checked once a process.

    Raises:
        BaseModelError: transformers cannot read the file, or its architecture is unknown.
    """
    folder = conversion_folder(source)
    if folder in _verified and (folder / MANIFEST).is_file():
        return folder
    if damage(folder):  # else processes that start together need not wait for each other
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if problem := damage(folder):
                if folder.exists():
                    logger.warning("the conversion of %s in the cache is damaged (%s); doing it again", source, problem)
                else:
                    logger.info("converting %s to safetensors, once: %s", source.name, folder)
                _convert(source, folder)
    _verified.add(folder)
    return folder


def conversion_folder(source: Path) -> Path:
    """Return the folder that a .gguf file is converted to; its name is made of the file's content."""
    return assets.cache_dir() / "models" / f"{sha256_file(source)[:16]}-{CONVERSION}"


def storage_dtype(reader: GGUFReader) -> torch.dtype:
    """Return the dtype to keep a .gguf file's weights in: its own when most are floats, bf16 when quantized.

    Values quantized to eight bits or fewer are several per cent from the original; what bf16 rounds off (0.2 %) is
    no loss beside that. It halves the folder, and a base is then the same whichever dtype it is loaded in.
    """
    import torch

    elements: Counter[str] = Counter()
    for tensor in reader.tensors:
        elements[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = elements.most_common(1)[0][0]
    return {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        with _fast_gguf() as read:
            reader = read(str(source))
            tokenizer = AutoTokenizer.from_pretrained(**file)
            model: Any = AutoModelForCausalLM.from_pretrained(**file, dtype=storage_dtype(reader), **_unpacked())
            stated = _special_tokens(reader)
            for key, value in stated.items():
                setattr(tokenizer, key, value)
    except Exception as error:  # the reader raises whatever the damaged field happens to break
        reason = one_line(error) or type(error).__name__
        raise BaseModelError(f"{source}: not a .gguf file transformers can read ({reason[:300]})") from error
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
        settings = temporary / "tokenizer_config.json"
        write_json(settings, {**read_json(settings), **stated})  # transformers leaves them out


def _special_tokens(reader: GGUFReader) -> dict[str, bool]:
    """Return whether a beginning and an end of text are added to every text, as far as a .gguf file says."""
    fields = {key: reader.get_field(f"tokenizer.ggml.{key}") for key in ("add_bos_token", "add_eos_token")}
    return {key: bool(field.contents()) for key, field in fields.items() if field is not None}


def _unpacked() -> dict[str, Any]:
    """Return what keeps newer transformers from leaving the weights in their blocks where a kernel is installed."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


@contextlib.contextmanager
def _fast_gguf() -> Iterator[Any]:
    """Let transformers use fast versions of three functions of gguf, and yield the one that reads a file.

    transformers reads the whole vocabulary three times, and makes the map of names for every module; it looks the
    functions up when it needs them.
    """
    fast = {
        "GGUFReader": functools.cache(FastReader),
        "dequantize": dequantize,
        "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map),
    }
    with _patching:
        slow = {name: getattr(gguf, name) for name in fast}
        for name, function in fast.items():
            setattr(gguf, name, function)
        try:
            yield fast["GGUFReader"]
        finally:
            for name, function in slow.items():
                setattr(gguf, name, function)


class FastReader(GGUFReader):
    """A reader of .gguf files that takes an array of metadata at once, where gguf's own makes views of each entry."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        kind, length, start = GGUFValueType(head[0][0]), int(head[1][0]), orig_offs + 12
        if kind == GGUFValueType.STRING:
            entries, end = self._strings(start, length)
        elif kind in self.gguf_scalar_to_np:
            values = np.asarray(self._get(start, self.gguf_scalar_to_np[kind], length))
            if len(values) != length:
                raise ValueError("the file is cut short")
            entries, end = list(values.reshape(-1, 1)), start + values.nbytes
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        types = [GGUFValueType.ARRAY, *([kind] if entries else [])]
        return end - orig_offs, [*head, *entries], list(range(2, 2 + length)), types

    def _strings(self, start: int, count: int) -> tuple[list[Any], int]:
        """Return the bytes of each string, and where the last one ends."""
        data, entries = np.asarray(self.data), []  # plain views: those of a memory map take ten times as long
        for _ in range(count):
            (size,) = struct.unpack_from("=Q", cast(Any, data), start)  # raises past the end of the file
            start += 8 + size
            entries.append(data[start - size : start])
        return entries, start


def dequantize(data: np.ndarray, qtype: GGMLQuantizationType) -> np.ndarray:
    """Unpack weights with gguf's own function, a few rows at a time, as it would take several times as long at once."""
    if qtype in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return gguf.quants.dequantize(data, qtype)
    rows = np.asarray(data).reshape(-1, data.shape[-1])
    values = np.empty(gguf.quant_shape_from_byte_shape(rows.shape, qtype), np.float32)
    step = max(1, SLAB // rows.shape[1])
    for row in range(0, len(rows), step):
        values[row : row + step] = gguf.quants.dequantize(rows[row : row + step], qtype)
    return values.reshape(*data.shape[:-1], -1)
