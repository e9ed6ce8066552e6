"""Load a base under another head than a decoder's own: a new classification head, or an encoder's masked-LM head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gaintune.config import CLASSIFIER_BASE, ModelConfig
from gaintune.errors import BaseModelError, ConfigError
from gaintune.models.base import (
    Base,
    load_model,
    loading_options,
    read_architecture,
    read_weights,
    resolve_device,
    resolve_dtype,
    tokenizer_of,
    with_identity,
)
from gaintune.models.checkpoints import Checkpoint, locate

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

HEADS = ("classifier", "score", "pre_classifier", "pooler")  # what transformers calls the parts of such a head


@dataclass(frozen=True)
class ClassifierBase(Base):
    """A base with a head for classes, which is new and in fp32, whatever the precision of the base.

    Attributes:
        labels: name of each class, in the order of the logits.
        head: names of the modules that make up the head.
        padding: token that fills rows up on the right.
        longest: most tokens of a row that the model takes; None where nothing says.
    """

    labels: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    padding: int = 0
    longest: int | None = None

    def check_length(self, max_length: int) -> None:
        """Refuse rows longer than the model takes, with `ConfigError`."""
        if self.longest is not None and max_length > self.longest:
            raise ConfigError(
                f"classify.max_length is {max_length}, but model {self.name!r} takes {self.longest} tokens at most"
            )


def load_classifier(
    config: ModelConfig, labels: Sequence[str], *, seed: int, dtype: torch.dtype | None = None
) -> ClassifierBase:
    """Load an encoder or a decoder with a new head that gives one logit for each label.

    An encoder's head reads its first token, a decoder's the last token of a row before the padding.

    Args:
        config: the base; see `load_base`.
        labels: names of the classes.
        seed: seed of the head's start values.
        dtype: overrides `config.dtype`.

    Raises:
        AssetError: its files cannot be fetched.
        BaseModelError: they are no encoder or decoder that can be given such a head, or lack other weights than its.
        ConfigError: the device is not there.
    """
    from transformers import AutoModelForSequenceClassification, set_seed
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    checkpoint = locate(config)
    architecture = read_architecture(checkpoint, config)
    known = architecture.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    own_code = "AutoModelForSequenceClassification" in (getattr(architecture, "auto_map", None) or {})
    if architecture.is_encoder_decoder or not (known or own_code):
        raise BaseModelError(
            f"model {checkpoint.name!r} is a {_kind(architecture)}; a classifier needs an encoder, such as "
            f"{CLASSIFIER_BASE}, or a decoder that transformers has a classification head for"
        )
    tokenizer = tokenizer_of(checkpoint, config)
    device = resolve_device(config.device)
    names = dict(enumerate(labels))
    set_seed(seed)
    model, missing = read_weights(
        AutoModelForSequenceClassification,
        checkpoint,
        dtype or resolve_dtype(config.dtype, device),
        device,
        **loading_options(config),
        unquantized=HEADS,
        num_labels=len(names),
        id2label=names,
        label2id={name: number for number, name in names.items()},
        problem_type="single_label_classification",
    )
    head = _head_of(model, missing, checkpoint)
    for name in head:
        _in_float32(model.get_submodule(name), name, checkpoint)
    base = with_identity(model, tokenizer, checkpoint, config)
    return ClassifierBase(
        **vars(base),
        labels=tuple(labels),
        head=head,
        padding=_set_padding(model, tokenizer, checkpoint),
        longest=longest_input(model, tokenizer),
    )


def reads_segments(config: ModelConfig) -> bool:
    """Return whether a base reads which of two texts a token is of, as BERT does; raises as `load_classifier` does."""
    architecture = read_architecture(locate(config), config)
    return (getattr(architecture, "type_vocab_size", None) or 0) > 1


def is_masked(config: ModelConfig) -> bool:
    """Return whether a base is a masked language model, by its config alone; raises as `load_masked` does."""
    return _masks(read_architecture(locate(config), config))


def _masks(architecture: PreTrainedConfig) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    own_code = "AutoModelForMaskedLM" in (getattr(architecture, "auto_map", None) or {})
    known = own_code or architecture.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return known and not architecture.is_encoder_decoder


def load_masked(config: ModelConfig, *, dtype: torch.dtype | None = None) -> Base:
    """Load an encoder with the masked-LM head it was pretrained with; every weight must be there.

    Raises:
        AssetError: its files cannot be fetched.
        BaseModelError: a decoder, or an encoder stored without its head.
        ConfigError: the device is not there.
    """
    from transformers import AutoModelForMaskedLM

    checkpoint = locate(config)
    architecture = read_architecture(checkpoint, config)
    if not _masks(architecture):
        raise BaseModelError(
            f"model {checkpoint.name!r} is a {_kind(architecture)}; masked-LM perplexity needs an encoder with the "
            f"head it was pretrained with, such as {CLASSIFIER_BASE}"
        )
    device = resolve_device(config.device)
    tokenizer = tokenizer_of(checkpoint, config)
    if tokenizer.mask_token_id is None:
        raise BaseModelError(f"model {checkpoint.name!r}: its tokenizer has no mask token")
    model = load_model(
        checkpoint,
        dtype or resolve_dtype(config.dtype, device),
        device,
        **loading_options(config),
        kind=AutoModelForMaskedLM,
    )
    return with_identity(model, tokenizer, checkpoint, config)


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the most tokens of a row, special ones counted; None where neither model nor tokenizer has a limit."""
    limits = [tokenizer.model_max_length]  # a huge number where the tokenizer does not know
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        embeddings = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
        padding = getattr(next(embeddings, None), "padding_idx", None)
        # RoBERTa and its kin count positions from behind the padding token's number
        limits.append(positions if padding is None else positions - 1 - padding)
    return min(limits) if min(limits) < 10**9 else None


def _kind(architecture: PreTrainedConfig) -> str:
    return ", ".join(sorted(architecture.architectures or ())) or architecture.model_type


def _head_of(model: PreTrainedModel, missing: Sequence[str], checkpoint: Checkpoint) -> tuple[str, ...]:
    """List the modules outside the backbone, and a pooler inside it that the folder lacks; nothing else may be new."""
    backbone = model.base_model_prefix
    head = [
        name for name, child in model.named_children() if name != backbone and any(True for _ in child.parameters())
    ]
    pooler = f"{backbone}.pooler"
    if any(name.startswith(f"{pooler}.") for name in missing):
        head.append(pooler)
    beyond = [name for name in missing if not name.startswith(tuple(f"{module}." for module in head))]
    if beyond:
        raise BaseModelError(
            f"model {checkpoint.name!r}: {len(beyond)} weights besides the new head's are missing from "
            f"{checkpoint.folder}, the first is {beyond[0]}; transformers would have made them up at random"
        )
    if not missing:
        logger.warning("model %s: it is a classifier already, and its own head is continued", checkpoint.name)
    return tuple(head)


def _in_float32(head: nn.Module, name: str, checkpoint: Checkpoint) -> None:
    """Keep a head in fp32, and its input with it: small updates are lost in fewer bits."""
    if not all(parameter.is_floating_point() for parameter in head.parameters()):
        raise BaseModelError(
            f"model {checkpoint.name!r}: {name}, a part of its new head, was quantized with the base and cannot be "
            "trained: leave model.quantization out"
        )
    head.float()
    head.register_forward_pre_hook(_float_input)


def _float_input(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if isinstance(value, torch.Tensor) else value for value in inputs)


def _set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint) -> int:
    """Choose the token that fills rows up; a decoder's head finds the last token of a row by it."""
    config: Any = model.config.get_text_config()
    embedding: Any = model.get_input_embeddings()
    for token in (config.pad_token_id, tokenizer.pad_token_id, config.eos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int) and 0 <= token < embedding.weight.shape[0]:
            config.pad_token_id = token
            return token
    raise BaseModelError(
        f"model {checkpoint.name!r} has neither a padding nor an end-of-text token; set pad_token_id in its config.json"
    )
