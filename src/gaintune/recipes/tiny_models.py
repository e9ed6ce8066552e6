"""How the models of a smoke run are made: bytes as tokens, and random weights in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gaintune.storage.run import complete_folder, damage


def byte_tokenizer(special: Sequence[str]) -> Tokenizer:
    """Special tokens, numbered from 0, and then every byte."""
    vocabulary = {
        token: number for number, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def write_model(
    folder: Path, seed: int, make: Callable[[], PreTrainedModel], tokenizer: Callable[[], PreTrainedTokenizerFast]
) -> Path:
    """Write a model whose weights a seed decides, and its tokenizer, unless they are there; the folder."""
    if folder.is_dir() and damage(folder) is None:
        return folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    with complete_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer().save_pretrained(temporary)
    return folder
