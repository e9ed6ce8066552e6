"""From a plan's domain to rows a model is trained and measured on, whatever is to be learnt from them."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from gaintune.config import DataConfig, DomainConfig
from gaintune.data.examples import DomainBlocks
from gaintune.data.instruct import load_instruct
from gaintune.data.text import load_text
from gaintune.errors import ConfigError

__all__ = ["DomainBlocks", "load_domain"]


def load_domain(domain: DomainConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DomainBlocks:
    """Load, split and pack a domain within its budgets, for the task its plan names.

    Raises:
        DataError: the data are missing, broken, or too little on one side; the file and line are named.
        ConfigError: the domain is a classifier's, or the model lacks the chat template that is asked for.
        AssetError: a download failed.
        BaseModelError: the tokenizer has no end-of-text token.
    """
    task = data.task_of(domain)
    if task == "classify":
        raise ConfigError(
            f"domain {domain.name!r} has task classify, and this is for text and instructions alone: `gaintune "
            "adapt` and `gaintune evaluate` take classifiers, and PEFT loads one with its head onto the base"
        )
    return (load_instruct if task == "instruct" else load_text)(domain, data, tokenizer)
